"""Checkpoints: written in the background, and damaged by a crash, a full disk or a changed byte."""

import json
import os
import resource
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray.train
import torch

from rayjobs.errors import LeaseLostError, NonFiniteLossError, StorageError, UserError
from rayjobs.storage.lease_files import DRIVER_VARIABLE, Holder, LeaseFiles
from rayjobs.train import checkpoint, checkpoint_writer
from rayjobs.train.checkpoint import (
    POSITION_FILE,
    STATE_FILE,
    TrainingCheckpoint,
    WrittenCheckpoint,
    copy_finite,
    find_resumable,
    list_checkpoints,
    new_checkpoint_name,
    newest_readable,
    remove_unfinished,
    write_checkpoint,
)
from rayjobs.train.checkpoint_writer import CheckpointWriter
from rayjobs.train.ray_workarounds import delete_truncated_snapshot
from tests.waiting import PATIENCE_S, wait_until


def content(step: int) -> TrainingCheckpoint:
    return TrainingCheckpoint({"prompt": torch.full((5, 7), float(step))}, step, [{"step": step}])


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """Train's folder, in that of a run, with the checkpoints of steps 10, 20 and 30."""
    folder = tmp_path / "train"
    folder.mkdir()
    for step in (20, 10, 30):
        write_checkpoint(str(folder), content(step))
    (folder / "checkpoint_manager_snapshot.json").write_text("{}")
    return folder


@pytest.mark.parametrize(("name", "size"), [(STATE_FILE, 90), (STATE_FILE, 3), (STATE_FILE, 0), (POSITION_FILE, 4)])
def test_a_truncated_file_costs_one_checkpoint_and_is_reported(
    storage: Path, caplog: pytest.LogCaptureFixture, name: str, size: int
) -> None:
    whole = newest_readable(list_checkpoints(str(storage)))
    assert whole is not None
    assert whole.content.step == 30
    newest = max(storage.glob("checkpoint_0*"))
    os.truncate(newest / name, size)
    kept = newest_readable(list_checkpoints(str(storage)))
    assert kept is not None
    assert kept.content.step == 20
    assert kept.content.rows == [{"step": 20}]
    assert torch.equal(kept.content.state["prompt"], torch.full((5, 7), 20.0))
    assert f"{newest} is damaged" in caplog.text


def test_a_changed_byte_costs_one_checkpoint(storage: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A bit of a number is flipped, and the file still has the form of a checkpoint."""
    path = max(storage.glob("checkpoint_0*")) / STATE_FILE
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    kept = newest_readable(list_checkpoints(str(storage)))
    assert kept is not None
    assert kept.content.step == 20
    assert "the bytes of state.safetensors have changed since it was written" in caplog.text


def test_the_directory_of_a_checkpoint_that_was_cut_off_is_removed(storage: Path) -> None:
    """It has no position, which is written last. Ray Train's own record of a checkpoint keeps its directory."""
    cut, recorded = storage / "checkpoint_00000040", storage / "checkpoint_00000030"
    cut.mkdir()
    (cut / STATE_FILE).write_bytes(b"x")
    (recorded / POSITION_FILE).unlink()
    remove_unfinished(str(storage), {recorded.name})
    assert names(storage) == ["checkpoint_00000030", "checkpoint_00000020", "checkpoint_00000010"]


def test_a_worker_of_a_driver_that_was_taken_over_from_removes_nothing(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory without a position may be a checkpoint that the other driver's workers are writing."""
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", lambda **_: [])
    being_written = storage / "checkpoint_00000040"
    being_written.mkdir()
    other = Holder(driver="b", host="h", machine="h", pid=1, pid_since=0.0, since="2026-01-02", superseded=("a",))
    LeaseFiles(storage.parent).create(2, other)
    monkeypatch.setenv(DRIVER_VARIABLE, "a")
    with pytest.raises(LeaseLostError):
        find_resumable(str(storage), print)
    assert being_written.exists()
    monkeypatch.setenv(DRIVER_VARIABLE, "b")
    assert find_resumable(str(storage), print).content.step == 30
    assert not being_written.exists()


def test_a_lease_that_cannot_be_read_is_tried_again(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user error would end the training; for any other one Ray starts the workers again."""

    def no_answer(path: Path) -> None:
        raise StorageError("the bucket does not answer")

    monkeypatch.setattr(checkpoint, "check_lease", no_answer)
    with pytest.raises(OSError, match="does not answer") as raised:
        find_resumable(str(storage), print)
    assert not isinstance(raised.value, UserError)


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file be longer than 100 bytes, as on a full disk. Before a fixture ends, pytest would write to its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_nothing_is_left_of_a_checkpoint_that_cannot_be_written(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(OSError, match="File too large"):
        write_checkpoint(str(tmp_path), content(40))
    assert list(tmp_path.iterdir()) == []


def test_a_writer_returns_what_it_has_written_once(tmp_path: Path) -> None:
    with CheckpointWriter(str(tmp_path)) as writer:
        assert writer.is_idle
        assert writer.take(wait=True) is None
        for step in (10, 20):
            writer.start(content(step))
            assert not writer.is_idle
            written = writer.take(wait=True)
            assert written is not None
            assert written.step == step
            assert newest_readable([written.place]) is not None
            assert writer.take(wait=True) is None
        writer.start(content(30))
    assert names(tmp_path)[0] == "checkpoint_00000030", "the block's end waits for it"


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = threading.Event()

    def slow(storage: str, content: TrainingCheckpoint) -> WrittenCheckpoint:
        assert written.wait(PATIENCE_S)
        return write_checkpoint(storage, content)

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", slow)
    with CheckpointWriter(str(tmp_path)) as writer:
        writer.start(content(10))
        assert writer.take(wait=False) is None
        assert not writer.is_done
        written.set()
        assert writer.take(wait=True) is not None


def test_an_error_of_writing_is_raised_and_never_lost(tmp_path: Path) -> None:
    with full_disk():
        with CheckpointWriter(str(tmp_path)) as writer:
            writer.start(content(10))
            with pytest.raises(OSError, match="File too large"):
                writer.take(wait=True)
            assert writer.is_idle
        with pytest.raises(OSError, match="File too large"), CheckpointWriter(str(tmp_path)) as writer:
            writer.start(content(10))
        writer = CheckpointWriter(str(tmp_path))
        writer.start(content(10))
        writer.__exit__(ZeroDivisionError, ZeroDivisionError(), None)  # what ended the training is told instead


def test_what_was_written_is_not_kept(tmp_path: Path) -> None:
    with CheckpointWriter(str(tmp_path)) as writer:
        tensor = torch.zeros(5, 7)
        copy = weakref.ref(tensor)
        writer.start(TrainingCheckpoint({"prompt": tensor}, 10, []))
        del tensor
        wait_until(lambda: writer.is_done and copy() is None, "the copy is freed, though nobody has taken the result")


@pytest.mark.parametrize("keep", [True, False])
def test_a_state_that_is_not_finite_is_not_saved(keep: bool) -> None:
    """Every worker finds it, after all tensors have been gathered, whether it writes them or not."""
    state = {"prompt": torch.zeros(5, 7), "prompt.exp_avg": torch.tensor([1.0, float("inf")]), "w": torch.zeros(3)}
    tensors = iter(state.items())
    with pytest.raises(NonFiniteLossError, match=r"^prompt\.exp_avg is no longer finite after step 30, .* not saved\."):
        copy_finite(tensors, 30, keep=keep)
    assert next(tensors, None) is None
    finite = {"prompt": torch.zeros(5, 7), "large": torch.full((3,), 3e38)}
    copies = copy_finite(finite.items(), 30, keep=keep)
    assert list(copies) == (list(finite) if keep else [])
    assert all(torch.equal(copies[name], finite[name]) and copies[name] is not finite[name] for name in copies)


def test_others_can_read_a_checkpoint_if_the_umask_lets_them(storage: Path) -> None:
    umask = os.umask(0o027)
    try:
        folder = Path(write_checkpoint(str(storage), content(40)).place.path)
    finally:
        os.umask(umask)
    assert {(folder / name).stat().st_mode & 0o777 for name in (STATE_FILE, POSITION_FILE)} == {0o640}


def test_a_missing_file_costs_one_checkpoint_and_nothing_left_is_a_fresh_start(storage: Path) -> None:
    for folder in storage.glob("checkpoint_0*"):
        (folder / STATE_FILE).unlink()
    assert newest_readable(list_checkpoints(str(storage))) is None
    assert list_checkpoints(str(storage / "not-there")) == []


def test_a_storage_that_does_not_answer_is_no_damage(storage: Path) -> None:
    """The checkpoint may be whole: starting again from an older one would lose work."""
    newest = max(storage.glob("checkpoint_0*"))
    (newest / STATE_FILE).unlink()
    (newest / STATE_FILE).symlink_to(STATE_FILE)  # there, and cannot be read
    with pytest.raises(OSError, match=STATE_FILE):
        newest_readable(list_checkpoints(str(storage)))


def names(storage: Path) -> list[str]:
    return [Path(checkpoint.path).name for checkpoint in list_checkpoints(str(storage))]


def test_names_sort_by_step_and_are_never_used_twice(storage: Path) -> None:
    assert names(storage) == ["checkpoint_00000030", "checkpoint_00000020", "checkpoint_00000010"]
    for expected in ("checkpoint_00000020.001", "checkpoint_00000020.002"):
        name = new_checkpoint_name(str(storage), 20)
        assert name == expected
        (storage / name).mkdir()
    assert new_checkpoint_name(str(storage), 25) == "checkpoint_00000025"
    assert names(storage)[:3] == ["checkpoint_00000030", "checkpoint_00000020.002", "checkpoint_00000020.001"]


def test_a_run_begun_with_ray_s_own_names_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    """Those of rayjobs 0.1.0, named after the time, are older than any that is named after its step."""
    for step, name in ((5, "2025-12-31_23-00-00.1"), (7, "2026-01-01_00-00-00.5"), (9, "00000009")):
        Path(write_checkpoint(str(tmp_path), content(step)).place.path).rename(tmp_path / f"checkpoint_{name}")
        resumed = newest_readable(list_checkpoints(str(tmp_path)))
        assert resumed is not None
        assert resumed.content.step == step


def test_a_snapshot_that_ray_could_not_read_is_deleted(storage: Path) -> None:
    snapshot = storage / "checkpoint_manager_snapshot.json"
    snapshot.write_text(json.dumps({"whole": True}))
    delete_truncated_snapshot(str(storage))
    assert snapshot.exists()
    for cut in ("", '{"wh'):
        snapshot.write_text(cut)
        delete_truncated_snapshot(str(storage))
        assert not snapshot.exists()
    delete_truncated_snapshot(str(storage))
