"""Models and data sets on the Hugging Face hub: hf://org/name, hf://org/name@revision, hf://datasets/org/name.

`huggingface_hub` does the work, with its cache and its environment variables: HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE. Only files are fetched: no code of a repository is run. Where the hub cannot be reached, what its cache
holds is used.
"""

import glob
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rayjobs.errors import ConfigError, StorageError, UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
RepoType = Literal["model", "dataset"]

HUB = "hf://"

_NAME = r"[A-Za-z0-9][\w.\-]*"
_REVISION = r"(?:refs/\w+/[\w.\-]+|[\w.\-]+)"
_PATH = re.compile(
    rf"{HUB}(?P<type>datasets/)?(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>{_REVISION}))?(?:/(?P<file>.+))?"
)
_BARE_ID = re.compile(rf"{_NAME}/{_NAME}(?:@{_REVISION})?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubPath:
    """A repository on the hub, or a file or folder in it."""

    repo_id: str
    """Its id, `org/name`."""
    repo_type: RepoType = "model"
    revision: str | None = None
    """Branch, tag or commit; None for the main branch."""
    file: str = ""
    """Path in the repository; empty for the whole of it."""

    @classmethod
    def parse(cls, path: str | Path) -> "HubPath":
        """The parts of an `hf://` path. Raises ConfigError for one that is malformed."""
        match = _PATH.fullmatch(str(path).rstrip("/"))
        if match is None or ".." in str(path).split("/"):
            raise ConfigError(
                f"{path}: a path on the hub is {HUB}org/name, {HUB}org/name@revision, {HUB}org/name/file or "
                f"{HUB}datasets/org/name"
            )
        kind: RepoType = "dataset" if match["type"] else "model"
        return cls(match["repo"], kind, match["revision"], match["file"] or "")

    @property
    def pinned(self) -> bool:
        """True if the revision is a commit, whose files never change."""
        return bool(self.revision and _COMMIT.fullmatch(self.revision))

    def __str__(self) -> str:
        kind = "datasets/" if self.repo_type == "dataset" else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{HUB}{kind}{self.repo_id}{revision}" + (f"/{self.file}" if self.file else "")


def is_hub_path(path: str | Path) -> bool:
    return str(path).startswith(HUB)


def is_hub_id(text: str) -> bool:
    """Return whether text has the form of a hub id, `org/name` or `org/name@revision`."""
    return bool(_BARE_ID.fullmatch(text))


def public_name(path: str) -> str:
    """The part of a path or URL that may be published: a hub path as it is, else the last name."""
    return path if is_hub_path(path) else path.rstrip("/").rpartition("/")[2]


def pin(path: str) -> str:
    """An `hf://` path with its revision replaced by the commit that it names at present; any other path as it is.

    So all processes of a run read the same files. Where the hub cannot be reached, the commit is the one of the last
    time. Raises StorageError.
    """
    if not is_hub_path(path) or (hub := HubPath.parse(path)).pinned:
        return path
    from huggingface_hub import HfApi

    with hub_errors(hub):
        commit = HfApi().resolve_revision(hub.repo_id, repo_type=hub.repo_type, revision=hub.revision).resolved
    return str(replace(hub, revision=commit))


def hub_snapshot(
    repo_id: str,
    *,
    repo_type: RepoType = "model",
    revision: str | None = None,
    allow_patterns: Sequence[str] | None = None,
    progress: bool = False,
) -> Path:
    """The folder in the hub's cache with a repository's files, fetched unless they are there.

    allow_patterns: shell patterns of the files to fetch; None for all. progress: show a bar on a terminal.

    Raises StorageError, in one line with the way out, if there is no such repository or revision, if it may not be
    read, or if the hub cannot be reached and the cache does not hold the files.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(HubPath(repo_id, repo_type, revision)):
        patterns = None if allow_patterns is None else list(allow_patterns)
        bar = _progress_bar(shown=progress and sys.stderr.isatty())
        folder = snapshot_download(
            repo_id, repo_type=repo_type, revision=revision, allow_patterns=patterns, tqdm_class=bar
        )
        return Path(folder)


def _progress_bar(*, shown: bool) -> Any:
    """The class of the bars of a download; the library's own is shown wherever it likes."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": not shown})

    return Bar


def hub_copy(hub: HubPath, *, progress: bool = False) -> Path:
    """The local copy of a file or folder of a repository, or of all of it, in the hub's cache.

    Raises StorageError as `hub_snapshot` does, and FileNotFoundError if the repository has no such file.
    """
    name = glob.escape(hub.file)
    patterns = [name, f"{name}/*"] if hub.file else None
    folder = hub_snapshot(
        hub.repo_id, repo_type=hub.repo_type, revision=hub.revision, allow_patterns=patterns, progress=progress
    )
    copy = folder / hub.file
    if not copy.exists():
        raise FileNotFoundError(f"{hub}: the repository has no such file")
    return copy


def ask_hub(hub: HubPath, ask: Callable[["HfApi"], T], look: Callable[[Path], T]) -> T:
    """The hub's answer; where it cannot be reached, that of the folder in its cache.

    look: finds the answer in the folder of the revision's files, or raises FileNotFoundError.

    Raises StorageError.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    with hub_errors(hub):
        try:
            return ask(HfApi())
        except HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise
            reason: Exception = error
        except Exception as error:  # each release has another library for HTTP, with errors of its own
            reason = error
        try:
            names: dict[str, Any] = {"repo_type": hub.repo_type, "revision": hub.revision}
            return look(Path(snapshot_download(hub.repo_id, **names, allow_patterns=[], local_files_only=True)))
        except FileNotFoundError:
            raise reason from None


@contextmanager
def hub_errors(hub: HubPath, *, uploading: bool = False) -> Iterator[None]:
    """Turn the errors of `huggingface_hub` into StorageErrors of one line, which name the path and the way out.

    A UserError passes as it is. uploading: True where no cache can stand in for the hub.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise StorageError(f"{hub}: {_explain(hub, error, uploading)}") from error


_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def _explain(hub: HubPath, error: Exception, uploading: bool) -> str:
    """Describe what is wrong, and what to do about it."""
    from huggingface_hub import constants, errors

    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # an upload that failed says only of which file
    kind = "data set" if hub.repo_type == "dataset" else "model"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    reason = " ".join(str(error).split()) or type(error).__name__
    match error:
        case errors.GatedRepoError():
            page = f"{constants.ENDPOINT}/{'datasets/' if hub.repo_type == 'dataset' else ''}{hub.repo_id}"
            return f"the {kind} is gated: accept its terms at {page}, then {_LOGIN}"
        case errors.RepositoryNotFoundError():
            return (
                f"the hub, {constants.ENDPOINT}, has no such {kind}, or it is private: check the spelling, of a local "
                f"path too; for a private one, {_LOGIN}"
            )
        case errors.RevisionNotFoundError():
            return f"the {kind} has no revision {hub.revision}: give a branch, a tag or a commit"
        case errors.HFValidationError() | errors.BadRequestError():
            return reason
        case ValueError() if isinstance(error.__cause__, errors.BadRequestError):  # a card that the hub refuses
            return reason
        case OSError() if error.errno and not isinstance(error, ConnectionError):
            return f"{constants.HF_HUB_CACHE} cannot be written: {reason}; HF_HOME names another cache"
        case _ if status == 401:
            return f"the hub, {constants.ENDPOINT}, asks for a valid token: {_LOGIN}"
        case _ if status == 403:
            return f"the token lacks the right to do this ({reason:.200}): {_LOGIN} to one that has it"
    held, way_out = f"{constants.HF_HUB_CACHE} holds no complete copy, and ", ", or name a local folder"
    if uploading:
        held = way_out = ""
    if constants.HF_HUB_OFFLINE:
        return f"{held}HF_HUB_OFFLINE forbids to ask the hub: unset it{way_out}"
    return f"{held}the hub, {constants.ENDPOINT}, cannot be reached ({reason:.200}): try again{way_out}"
