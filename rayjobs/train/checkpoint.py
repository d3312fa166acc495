"""Save and restore training checkpoints, one directory each, in Ray Train's folder.

A worker writes them; Ray Train is told of each once it is there, keeps the last two and records them in a file of its
own. The position is written last and holds the digest of the state, so that an unfinished directory and a changed byte
are noticed. Resume uses the newest checkpoint that is whole, whether Ray Train was told of it or not; damaged ones are
reported to the driver and skipped.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import ray.train
from pyarrow.fs import FileSelector, FileSystem, FileType
from ray.train import Checkpoint
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from adapter.json_object import parse_json
from rayjobs.errors import NonFiniteLossError, StorageError
from rayjobs.storage.lease import check_lease
from rayjobs.storage.paths import resolve_path

STATE_FILE, POSITION_FILE = "state.safetensors", "position.json"
DAMAGE = (SafetensorError, KeyError, ValueError, FileNotFoundError)
"""Errors that `read_checkpoint` raises for a checkpoint that is not whole."""

logger = logging.getLogger(__name__)


class TrainingCheckpoint(NamedTuple):
    """Training state after `step` optimizer steps."""

    state: dict[str, Tensor]
    step: int
    rows: list[dict[str, Any]]
    """Metrics since the last checkpoint but one. A run that resumes from this one reports them again, in case the run
    ended between the checkpoint and their report."""


class StoredCheckpoint(NamedTuple):
    """A checkpoint that is whole, and where it is."""

    place: Checkpoint
    content: TrainingCheckpoint


class WrittenCheckpoint(NamedTuple):
    """The place of a checkpoint that has been written, and its step."""

    place: Checkpoint
    step: int


def copy_finite(tensors: Iterable[tuple[str, Tensor]], step: int, *, keep: bool) -> dict[str, Tensor]:
    """Return copies of all tensors of the training state on the CPU; none of them without `keep`.

    Raises NonFiniteLossError, after all were taken, if one is not finite: the gradient of a finite loss may not be.
    """
    state, broken = {}, ""
    for name, tensor in tensors:
        if not (broken or tensor.sum().isfinite() or tensor.isfinite().all()):  # a sum is ten times faster
            broken = name
        if keep:
            state[name] = tensor.to("cpu", copy=True)
    if broken:
        raise NonFiniteLossError(
            f"{broken} is no longer finite after step {step}, which is not saved. With a lower optimizer.base_lr, or "
            "with optimizer.clip_norm, the same command goes on from the last checkpoint"
        )
    return state


def write_checkpoint(storage: str, content: TrainingCheckpoint) -> WrittenCheckpoint:
    """Write a checkpoint into a new directory of Train's folder.

    storage: a path or URI. Raises OSError, for instance for a full disk, and LeaseLostError if another driver has taken
    over the run; nothing is then left of the directory.
    """
    files, path = FileSystem.from_uri(storage)
    name = new_checkpoint_name(storage, content.step)
    folder = f"{path}/{name}"
    state = save(content.state)
    position = {"step": content.step, "rows": content.rows, "state_sha256": hashlib.sha256(state).hexdigest()}
    try:
        files.create_dir(folder)
        for file, data in ((STATE_FILE, state), (POSITION_FILE, json.dumps(position).encode())):
            check_lease(resolve_path(f"{storage}/{name}/{file}"))
            with files.open_output_stream(f"{folder}/{file}") as stream:
                stream.write(data)
    except BaseException:
        with suppress(OSError):
            files.delete_dir(folder)
        raise
    return WrittenCheckpoint(Checkpoint(folder, files), content.step)


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


def read_checkpoint(place: Checkpoint) -> TrainingCheckpoint:
    """Read a checkpoint. Raises one of `DAMAGE` if it is not whole, OSError if its storage does not answer."""
    data = read_bytes(place.filesystem, f"{place.path}/{STATE_FILE}")
    position = parse_json(read_bytes(place.filesystem, f"{place.path}/{POSITION_FILE}"))
    if not isinstance(position, dict) or not isinstance(position["step"], int) or not _are_rows(position["rows"]):
        raise ValueError(f"{POSITION_FILE} holds no step and rows")
    written = position.get("state_sha256")  # which earlier checkpoints lack
    if written and written != hashlib.sha256(data).hexdigest():
        raise ValueError(f"the bytes of {STATE_FILE} have changed since it was written")
    return TrainingCheckpoint(load(data), position["step"], position["rows"])


def _are_rows(rows: Any) -> bool:
    return isinstance(rows, list) and all(isinstance(row, dict) for row in rows)


def newest_readable(
    checkpoints: Iterable[Checkpoint], tell: Callable[[str], object] = logger.warning
) -> StoredCheckpoint | None:
    """Return the first checkpoint that can be read completely; `tell` is given a sentence for each damaged one.

    Raises OSError if a storage does not answer: the checkpoint may be whole, and resuming from an older one, or from
    none, would lose work.
    """
    for place in checkpoints:
        try:
            return StoredCheckpoint(place, read_checkpoint(place))
        except DAMAGE as error:
            tell(f"{place.path} is damaged ({error}); resuming from the checkpoint before it")
    return None


class Resumable(NamedTuple):
    """The checkpoint from which a run resumes."""

    content: TrainingCheckpoint
    unreported: Checkpoint | None
    """Its place, if Ray Train was not told of it before the workers ended: it can be told now, and then removes it
    when there are newer ones."""


def find_resumable(storage: str, tell: Callable[[str], object]) -> Resumable | None:
    """Return the checkpoint from which this run resumes; None at its start. Call it in a Train worker.

    storage: Train's folder, a path or URI. tell: as for `newest_readable`. What a crash has left of a checkpoint that
    was being written is removed. Raises StorageError if checkpoints were reported and none can be read: to start again
    would overwrite the run's metrics. Raises LeaseLostError, before anything is removed, if another driver has taken
    over the run, and an OSError that is no StorageError if the storage does not answer, which Ray Train tries again.
    """
    try:
        check_lease(resolve_path(f"{storage}/checkpoint"))
    except StorageError as error:
        raise OSError(str(error)) from error
    mode = ray.train.CheckpointConsistencyMode.COMMITTED
    reported = {Path(one.checkpoint.path).name for one in ray.train.get_all_reported_checkpoints(consistency_mode=mode)}
    remove_unfinished(storage, reported)
    newest = newest_readable(list_checkpoints(storage), tell)
    if reported and newest is None:
        raise StorageError(
            f"{storage}: none of the {len(reported)} checkpoints can be read; remove that folder to let the same "
            "command train from the beginning"
        )
    if newest is None:
        return None
    return Resumable(newest.content, None if Path(newest.place.path).name in reported else newest.place)


def remove_unfinished(storage: str, reported: Collection[str]) -> None:
    """Remove the directories whose writing was cut off: they have no position, and are not among those reported.

    storage: Train's folder, a path or URI. reported: names of directories.
    """
    for place in list_checkpoints(storage):
        position = place.filesystem.get_file_info(f"{place.path}/{POSITION_FILE}")
        if Path(place.path).name not in reported and position.type == FileType.NotFound:
            place.filesystem.delete_dir(place.path)


def read_bytes(files: FileSystem, path: str) -> bytes:
    """Return the content of a file. Raises FileNotFoundError for what is no file, OSError for one that is not read."""
    try:
        with files.open_input_stream(path) as stream:
            return bytes(stream.read())
    except OSError as error:
        if files.get_file_info(path).type == FileType.Directory:
            raise FileNotFoundError(f"{path} is a folder") from error
        raise
