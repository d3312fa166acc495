"""Upload a trained adapter to the Hugging Face hub: its file, its model card, and its run's settings and result.

The repository is made if there is none, for you alone unless `public` is set. A second push is a new commit. Settings
and result are uploaded without credentials, and with the names of files in place of their paths. Of the training
records, only digests are uploaded, by which adapter-eval knows them again: whoever has a record can find out whether it
was trained on.

The token is that of `hf auth login` or HF_TOKEN; it needs the right to write.
"""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from rayjobs.console import show_table
from rayjobs.errors import DataError, UserError
from rayjobs.job_configs.adapter_push import Config
from rayjobs.reporting.model_card import CARD_FILE, adapter_card, publishable, run_card
from rayjobs.runs.record import RECORD_FILE, RESULT_FILE, read_record
from rayjobs.runs.run_dir import CONFIG_FILE
from rayjobs.storage.download import cached_path
from rayjobs.storage.files import read_object
from rayjobs.storage.hub import HubPath, hub_errors
from rayjobs.storage.hub_model import ADAPTER_FILE, TRAINED_RECORDS_FILE, format_bytes
from rayjobs.storage.paths import resolve_path
from rayjobs.storage.yaml_file import dump_yaml, read_yaml

logger = logging.getLogger(__name__)


class Upload(NamedTuple):
    """A file of the repository."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def collect(settings: Config) -> list[Upload]:
    """The files to upload. Raises a UserError for a run that is not finished, or what is no adapter."""
    path = resolve_path(settings.adapter)
    if path.is_dir():
        return _collect_run(path, settings.repo)
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder; give the folder of a finished run, or an adapter file")
    if path.name == ADAPTER_FILE and (path.parent / RECORD_FILE).is_file():
        return _collect_run(path.parent, settings.repo)
    copy = cached_path(settings.adapter)
    card = adapter_card(copy, settings.repo.partition("/")[2])
    return [Upload(ADAPTER_FILE, copy), Upload(CARD_FILE, _adapted(card, settings.repo))]


def _collect_run(folder: Path, repo: str) -> list[Upload]:
    record = read_record(folder)
    if record is None:
        raise DataError(f"{folder} holds no run: there is no {RECORD_FILE}; give a run's folder, or an adapter file")
    if (state := record.now().state) != "done":
        raise DataError(f"{folder}: the run is not finished, but {state}; the command that began it resumes it")
    if not (folder / ADAPTER_FILE).is_file():
        raise DataError(f"{folder}: a run of {record.job}, which left no {ADAPTER_FILE}")
    own = folder / CARD_FILE
    card = own.read_text(encoding="utf-8") if own.is_file() else run_card(folder)
    result = json.dumps(publishable(read_object(folder / RESULT_FILE)), indent=2, ensure_ascii=False) + "\n"
    digests = folder / TRAINED_RECORDS_FILE
    return [
        Upload(ADAPTER_FILE, cached_path(folder / ADAPTER_FILE)),
        *([Upload(TRAINED_RECORDS_FILE, cached_path(digests))] if digests.is_file() else []),
        Upload(CARD_FILE, _adapted(card, repo)),
        Upload(CONFIG_FILE, dump_yaml(publishable(read_yaml(folder / CONFIG_FILE))).encode()),
        Upload(RESULT_FILE, result.encode()),
    ]


def _adapted(card: str, repo: str) -> bytes:
    """The card with the repository in its commands, in place of a file in the current folder."""
    return card.replace(f"adapter={ADAPTER_FILE}", f"adapter={repo}").encode()


def plan(settings: Config) -> None:
    """Show what `run` would upload. Nothing is asked of the hub."""
    rows = [[upload.name, format_bytes(upload.size)] for upload in collect(settings)]
    visibility = "public" if settings.public else "private"
    show_table(f"to {settings.repo} ({visibility}, branch {settings.branch})", ["file", "size"], rows)


def run(settings: Config) -> dict[str, Any]:
    """Upload; return the repository, the commit and its address.

    Raises StorageError if the hub refuses or cannot be reached, UserError if the repository is more public than wanted.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    uploads, api = collect(settings), HfApi()
    branch = None if settings.branch == "main" else settings.branch
    with hub_errors(HubPath(settings.repo, revision=branch), uploading=True):
        api.create_repo(settings.repo, private=not settings.public, exist_ok=True)
        before = api.repo_info(settings.repo, revision=settings.branch)
        if not settings.public and not before.private:
            raise UserError(f"{settings.repo} is there and is public: set public=true, or name another repository")
        operations = [CommitOperationAdd(upload.name, upload.content) for upload in uploads]
        commit = api.create_commit(settings.repo, operations, commit_message=settings.message, revision=settings.branch)
    if settings.public and before.private:
        logger.warning("%s was made private before, and stays so: change it on the hub", settings.repo)
    did = (
        "holds these files already" if commit.oid == before.sha else f"has {len(uploads)} files from {settings.adapter}"
    )
    logger.info("%s %s: %s", settings.repo, did, commit.commit_url)
    return {"repo": settings.repo, "commit": commit.oid, "url": commit.commit_url}
