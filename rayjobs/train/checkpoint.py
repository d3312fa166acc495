"""The training state on disk: a folder per checkpoint. The newest whole one is read, whatever became of the others.

Ray Train copies the folders to the run's storage, keeps two, and notes them in a file of its own.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ray.train
from pyarrow.fs import FileSelector, FileSystem, FileType
from ray.train import Checkpoint
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from rayjobs.errors import UserError

STATE_FILE, POSITION_FILE = "state.safetensors", "position.json"


class TrainingCheckpoint(NamedTuple):
    """A training state, and the steps that led to it."""

    state: dict[str, Tensor]
    step: int
    rows: list[dict[str, Any]]
    """Metrics that are reported together with this checkpoint: who dies in between does not take them along."""


def write_checkpoint(folder: str | Path, kept: TrainingCheckpoint) -> None:
    save_file(kept.state, Path(folder) / STATE_FILE)
    (Path(folder) / POSITION_FILE).write_text(json.dumps({"step": kept.step, "rows": kept.rows}))


def newest_readable(checkpoints: Iterable[Checkpoint]) -> TrainingCheckpoint | None:
    """The first that is whole; those before it are named on stderr. Raises OSError if a storage does not answer: what
    cannot be read now may be whole."""
    for checkpoint in checkpoints:
        try:
            state = load(_read(checkpoint.filesystem, f"{checkpoint.path}/{STATE_FILE}"))
            position = json.loads(_read(checkpoint.filesystem, f"{checkpoint.path}/{POSITION_FILE}"))
            return TrainingCheckpoint(state, position["step"], position["rows"])
        except (SafetensorError, KeyError, ValueError, FileNotFoundError) as error:
            told = f"{checkpoint.path} is damaged ({error}); going on from the checkpoint before it"
            print(told, file=sys.stderr, flush=True)
    return None


def find_resumable(storage: str) -> TrainingCheckpoint | None:
    """Where this run goes on: from the newest whole checkpoint that its workers have reported. For a worker to ask.

    storage: Train's folder, a path or URI; its listing stands in where Ray's note was lost. Raises ValueError if all
    that were reported are damaged: to begin anew would write over the run's figures.
    """
    mode = ray.train.CheckpointConsistencyMode.COMMITTED
    known = [one.checkpoint for one in ray.train.get_all_reported_checkpoints(consistency_mode=mode)]
    kept = newest_readable(known[::-1] or list_checkpoints(storage))
    if known and kept is None:
        raise UserError(
            f"{storage}: none of the {len(known)} checkpoints that are kept can be read; the same command begins anew "
            "once that folder is removed"
        )
    return kept


def list_checkpoints(storage: str) -> list[Checkpoint]:
    """All checkpoints in Train's folder, the newest first: they are named after the time."""
    files, path = FileSystem.from_uri(storage)
    found = files.get_file_info(FileSelector(path, allow_not_found=True))
    paths = [one.path for one in found if one.type == FileType.Directory and one.base_name.startswith("checkpoint_")]
    return [Checkpoint(path, files) for path in sorted(paths, reverse=True)]


def _read(files: FileSystem, path: str) -> bytes:
    with files.open_input_stream(path) as stream:
        return bytes(stream.read())
