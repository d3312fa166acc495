"""Save and restore training checkpoints, one directory each.

Ray Train copies the directories to the run's storage, keeps the last two and records them in a file of its own. Resume
uses the newest checkpoint that can be read completely; damaged ones are reported to the driver and skipped.
"""

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ray.train
from pyarrow.fs import FileSelector, FileSystem, FileType
from ray.train import Checkpoint
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from rayjobs.errors import StorageError
from rayjobs.storage.files import atomic_path

STATE_FILE, POSITION_FILE = "state.safetensors", "position.json"

logger = logging.getLogger(__name__)


class TrainingCheckpoint(NamedTuple):
    """Training state after `step` optimizer steps."""

    state: dict[str, Tensor]
    step: int
    rows: list[dict[str, Any]]
    """Metrics since the last checkpoint but one. A run that resumes from this one reports them again, in case the run
    ended between the checkpoint and their report."""


def write_checkpoint(folder: str | Path, checkpoint: TrainingCheckpoint) -> None:
    with atomic_path(Path(folder) / STATE_FILE) as temporary:  # save_file alone gives a file that only its owner reads
        save_file(checkpoint.state, temporary)
    (Path(folder) / POSITION_FILE).write_text(json.dumps({"step": checkpoint.step, "rows": checkpoint.rows}))


def new_checkpoint_name(storage: str, step: int) -> str:
    """Return a directory name that no checkpoint in Train's folder has; names sort by step.

    A step that is done again, because its checkpoint was damaged or cut off by a failure, gets a number appended. Ray
    would otherwise delete the new checkpoint together with the old one of the same name.
    """
    name = f"checkpoint_{step:08d}"
    taken = {Path(checkpoint.path).name for checkpoint in list_checkpoints(storage)}
    again = (f"{name}.{number:03d}" for number in range(1, 1000))
    return name if name not in taken else next(candidate for candidate in again if candidate not in taken)


def list_checkpoints(storage: str) -> list[Checkpoint]:
    """Return all checkpoints in Train's folder, the newest first.

    storage: a path or URI. Names of `new_checkpoint_name` sort by step. Before them come, in time, Ray's own names
    `checkpoint_<date>_<time>`, which runs begun with rayjobs 0.1.0 have.
    """
    files, path = FileSystem.from_uri(storage)
    entries = files.get_file_info(FileSelector(path, allow_not_found=True))
    names = [
        entry.base_name
        for entry in entries
        if entry.type == FileType.Directory and entry.base_name.startswith("checkpoint_")
    ]
    newest_first = sorted(names, key=lambda name: ("-" not in name, name), reverse=True)
    return [Checkpoint(f"{path}/{name}", files) for name in newest_first]


def newest_readable(
    checkpoints: Iterable[Checkpoint], tell: Callable[[str], object] = logger.warning
) -> TrainingCheckpoint | None:
    """Return the first checkpoint that can be read completely; `tell` is given a sentence for each damaged one.

    Raises OSError if a storage does not answer: the checkpoint may be whole, and resuming from an older one, or from
    none, would lose work.
    """
    for checkpoint in checkpoints:
        try:
            state = load(read_bytes(checkpoint.filesystem, f"{checkpoint.path}/{STATE_FILE}"))
            position = json.loads(read_bytes(checkpoint.filesystem, f"{checkpoint.path}/{POSITION_FILE}"))
            return TrainingCheckpoint(state, position["step"], position["rows"])
        except (SafetensorError, KeyError, ValueError, FileNotFoundError) as error:
            tell(f"{checkpoint.path} is damaged ({error}); resuming from the checkpoint before it")
    return None


def find_resumable(storage: str, tell: Callable[[str], object]) -> TrainingCheckpoint | None:
    """Return the checkpoint from which this run resumes; None at its start. Call it in a Train worker.

    storage: Train's folder, a path or URI. Its listing is used if Ray's own record is lost. tell: as for
    `newest_readable`. Raises StorageError if checkpoints were reported and none can be read: to start again would
    overwrite the run's metrics.
    """
    mode = ray.train.CheckpointConsistencyMode.COMMITTED
    reported = [one.checkpoint for one in ray.train.get_all_reported_checkpoints(consistency_mode=mode)]
    checkpoint = newest_readable(reported[::-1] or list_checkpoints(storage), tell)
    if reported and checkpoint is None:
        raise StorageError(
            f"{storage}: none of the {len(reported)} checkpoints can be read; remove that folder to let the same "
            "command train from the beginning"
        )
    return checkpoint


def read_bytes(files: FileSystem, path: str) -> bytes:
    with files.open_input_stream(path) as stream:
        return bytes(stream.read())
