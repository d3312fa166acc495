"""A run's folder: where it lives, and what is written into it at the start."""

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib import metadata
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
import yaml
from pydantic import Field
from rayjobs.config import config, to_dict
from rayjobs.cluster.hardware import HARDWARE_FILE, describe_hardware
from rayjobs.storage.paths import AnyPath, is_url, resolve_path
from rayjobs.cluster.shared_storage import not_shared_message
from rayjobs.runs.record import start_run
from rayjobs.storage.files import write_json, write_text
from rayjobs.runs.trackers import TrackConfig, open_trackers



@config
class RunConfig:
    """Where a run lives. The same command on the same folder resumes it."""

    name: str = Field(pattern=r"^[\w.\-]+$")
    """The run's name; its folder is `storage/name`."""
    storage: AnyPath = "runs"
    """The folder of all runs; on a cluster, one that every node sees, or a URL such as s3://bucket/runs."""
    cache: AnyPath | None = None
    """Where prepared data is kept and shared between runs, a folder or a URL; by default `storage/cache`."""
    track: TrackConfig = TrackConfig()

    @property
    def folder(self) -> Path:
        return resolve_path(self.storage) / self.name

    @property
    def cache_folder(self) -> Path:
        return resolve_path(self.cache) if self.cache else resolve_path(self.storage) / "cache"


def open_run(run: RunConfig, settings: Any) -> Path:
    """The run's folder, with the resolved config, versions, commit, describe_hardware and the run's record written into it; they
    are those of the outer job where one job is a part of another's run."""
    if start_run(run.folder, settings):
        write_text(run.folder / "config.yaml", yaml.safe_dump(to_dict(settings), sort_keys=False))
        write_json(run.folder / "versions.json", versions())
        write_json(run.folder / HARDWARE_FILE, describe_hardware())
        for tracker in open_trackers(run.folder, run.track):  # where they fail, they should before the work
            tracker.close()
    return run.folder


def versions() -> dict[str, str]:
    """What a result depends on besides its config."""
    names = ("torch", "ray", "deepspeed", "pyarrow", "open_clip_torch", "sentencepiece", "numpy")
    found = {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}
    here = Path(__file__).parent
    git = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {**found, "commit": git.stdout.strip() if git.returncode == 0 else "unknown"}
