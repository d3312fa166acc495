"""The folder of a run: where it is, and what is written into it at the start."""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

import rayjobs
from rayjobs.cluster.hardware import HARDWARE_FILE, describe_hardware
from rayjobs.config import config, to_dict
from rayjobs.errors import ConfigError
from rayjobs.runs.record import start_run
from rayjobs.runs.trackers import TrackConfig, open_trackers
from rayjobs.storage.credentials import mask_credentials
from rayjobs.storage.files import write_json
from rayjobs.storage.paths import AnyPath, check_reachable, resolve_path
from rayjobs.storage.yaml_file import write_yaml

CONFIG_FILE = "config.yaml"
VERSIONS_FILE = "versions.json"
PROVENANCE_FILE = "provenance.json"
"""Identity of a training run, by the content of all that its result depends on."""
REJECTED_FILE = "rejected.jsonl"
"""The records or images that a job could not use, each with its reason."""


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[\w.\-]+", name) or not name.strip("."):
        raise ConfigError("must be the name of a folder in run.storage: letters, digits, `_`, `-` and `.`")
    return name


FolderName = Annotated[str, AfterValidator(_folder_name)]


@config
class RunConfig:
    """The folders of a run and its cache. The same command with the same folder resumes the run."""

    name: FolderName
    """Name of the run, of letters, digits, `_`, `-` and `.`; its folder is `storage/name`."""
    storage: AnyPath = "runs"
    """Folder of all runs: on a cluster, one that every node sees, or a URL such as s3://bucket/runs."""
    cache: AnyPath | None = None
    """Folder or URL of prepared data, which runs share; null is `storage/cache`."""
    track: TrackConfig = TrackConfig()

    def __post_init__(self) -> None:
        if self.folder == self.cache_folder:
            raise ConfigError(f"run.name is {self.name}, but {self.folder} is the folder of prepared data, run.cache")
        for name, path in (("run.storage", self.storage), ("run.cache", self.cache)):
            if path and os.path.isfile(path):
                raise ConfigError(f"{name} is {path}, a file: give a folder, which is made if there is none")

    @property
    def folder(self) -> Path:
        return resolve_path(self.storage) / self.name

    @property
    def cache_folder(self) -> Path:
        return resolve_path(self.cache) if self.cache else resolve_path(self.storage) / "cache"


def open_run(run: RunConfig, settings: Any) -> Path:
    """Start the run of a job, and write its resolved config, versions, commit and hardware into its folder.

    Credentials of URLs are not written. A job that is a part of another job's run leaves that job's files as they are.
    `settings` is the job's config, whose `JOB` is the job's name.

    Raises StorageError if a URL of the run cannot be reached, ResourceError if another process is running there, and
    what a tracker raises if it cannot be reached: better now than after the work.
    """
    check_reachable(run.folder)
    check_reachable(run.cache_folder)
    if start_run(run.folder, settings.JOB):
        write_yaml(run.folder / CONFIG_FILE, mask_credentials(to_dict(settings)))
        write_json(run.folder / VERSIONS_FILE, versions())
        write_json(run.folder / HARDWARE_FILE, describe_hardware())
        for tracker in open_trackers(run.folder, run.track):
            tracker.close()
    return run.folder


def versions() -> dict[str, str]:
    """The versions of Python, of the libraries and of this code that results depend on."""
    names = ("torch", "ray", "deepspeed", "pyarrow", "open_clip_torch", "sentencepiece", "numpy")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        described = subprocess.run(git, capture_output=True, text=True)
        commit = described.stdout.strip() if described.returncode == 0 else "unknown"
    except FileNotFoundError:  # git is not installed, as in an image without it
        commit = "unknown"
    return {
        "python": platform.python_version(),
        "rayjobs": rayjobs.__version__,
        **{name: metadata.version(name) for name in names},
        "commit": commit,
    }
