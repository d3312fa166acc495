"""Checkpoints that a crash or a full disk has damaged."""

import json
import os
from pathlib import Path

import pytest
import torch

from rayjobs.train.checkpoint import (
    POSITION_FILE,
    STATE_FILE,
    TrainingCheckpoint,
    list_checkpoints,
    newest_readable,
    write_checkpoint,
)
from rayjobs.train.ray_workarounds import delete_truncated_snapshot


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """Train's folder with the checkpoints of steps 10, 20 and 30."""
    for step in (20, 10, 30):
        folder = tmp_path / f"checkpoint_2026-01-01_00-00-{step}.5"
        folder.mkdir()
        write_checkpoint(
            folder, TrainingCheckpoint({"prompt": torch.full((5, 7), float(step))}, step, [{"step": step}])
        )
    (tmp_path / "checkpoint_manager_snapshot.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(("name", "size"), [(STATE_FILE, 90), (STATE_FILE, 3), (STATE_FILE, 0), (POSITION_FILE, 4)])
def test_a_truncated_file_costs_one_checkpoint_and_is_told(
    storage: Path, capsys: pytest.CaptureFixture[str], name: str, size: int
) -> None:
    whole = newest_readable(list_checkpoints(str(storage)))
    assert whole is not None
    assert whole.step == 30
    newest = max(storage.glob("checkpoint_2*"))
    os.truncate(newest / name, size)
    kept = newest_readable(list_checkpoints(str(storage)))
    assert kept is not None
    assert kept.step == 20
    assert kept.rows == [{"step": 20}]
    assert torch.equal(kept.state["prompt"], torch.full((5, 7), 20.0))
    assert f"{newest} is damaged" in capsys.readouterr().err


def test_a_missing_file_costs_one_checkpoint_and_nothing_left_is_a_fresh_start(storage: Path) -> None:
    for folder in storage.glob("checkpoint_2*"):
        (folder / STATE_FILE).unlink()
    assert newest_readable(list_checkpoints(str(storage))) is None
    assert list_checkpoints(str(storage / "not-there")) == []


def test_a_storage_that_does_not_answer_is_no_damage(storage: Path) -> None:
    """It may answer again, and what is there be whole; to begin anew would write over it."""
    newest = max(storage.glob("checkpoint_2*"))
    (newest / STATE_FILE).unlink()
    (newest / STATE_FILE).mkdir()  # there, and cannot be read
    with pytest.raises(OSError, match=STATE_FILE):
        newest_readable(list_checkpoints(str(storage)))


def test_a_note_that_ray_could_not_read_is_removed(storage: Path) -> None:
    note = storage / "checkpoint_manager_snapshot.json"
    note.write_text(json.dumps({"whole": True}))
    delete_truncated_snapshot(str(storage))
    assert note.exists()
    for cut in ("", '{"wh'):
        note.write_text(cut)
        delete_truncated_snapshot(str(storage))
        assert not note.exists()
    delete_truncated_snapshot(str(storage))
