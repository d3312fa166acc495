"""`rayjobs verify`: the files of a finished run against their digests, and a part of its training made again."""

import json
from pathlib import Path

import pytest
import torch

from rayjobs.__main__ import main
from rayjobs.errors import ConfigError
from rayjobs.storage.files import read_jsonl, write_json
from rayjobs.train.checkpoint import TrainingCheckpoint, list_checkpoints, read_checkpoint, write_checkpoint
from rayjobs.verify import check_metrics, choose_part, compare


def saved(*steps: int) -> list[TrainingCheckpoint]:
    return [TrainingCheckpoint({}, step, []) for step in steps]


@pytest.mark.parametrize(
    ("left", "step", "chosen"),
    [
        ([40, 50], None, (40, 50)),
        ([40, 50], 40, (40, 50)),
        ([40, 50], 0, (0, 40)),
        ([50], None, (0, 50)),
    ],
)
def test_the_part_that_is_repeated_lies_between_two_checkpoints(
    left: list[int], step: int | None, chosen: tuple[int, int]
) -> None:
    part = choose_part(saved(*left), step)
    assert (part.first_step, part.end.step) == chosen
    assert (part.start is None) == (part.first_step == 0)


@pytest.mark.parametrize("step", [50, 45, -1])
def test_a_step_without_a_checkpoint_after_it_is_refused_with_those_that_there_are(step: int) -> None:
    with pytest.raises(ConfigError, match=f"--step {step}: the training can be made again from step 0 or 40"):
        choose_part(saved(40, 50), step)


def test_tensors_are_compared_to_the_bit() -> None:
    one = {"a": torch.tensor([[1.0, 0.0, -2.0]]), "b": torch.zeros(3), "c": torch.tensor(5.0)}
    assert compare("x: ", one, {name: tensor.clone() for name, tensor in one.items()}) == []
    other = {"a": torch.tensor([[1.0, -0.0, -2.5]]), "b": torch.zeros(5), "d": torch.zeros(1)}
    assert compare("x: ", one, other) == [
        "x: c is in one of both only",
        "x: d is in one of both only",
        "x: a differs in 1 of 3 values, by at most 0.5",
        "x: b was (3,), now (5,)",
    ]
    assert compare("", {"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])}), "the sign of a zero is a bit too"


def test_the_metrics_hold_each_step_once(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", {"steps": 3})
    for steps, told in (
        ([1, 2, 3], []),
        ([1, 2, 2, 3], ["metrics.jsonl: holds 4 steps up to 3, not each of 3 once"]),
        ([1, 2], ["metrics.jsonl: holds 2 steps up to 2, not each of 3 once"]),
    ):
        rows = [{"step": 0, "val_loss": 1.0}, *({"step": step, "loss": 1.0} for step in steps)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert check_metrics(tmp_path) == told


@pytest.mark.parametrize(
    ("state", "step", "told"),
    [
        (None, "0", "holds no run: only a run that is done can be verified"),
        ("failed", "0", "holds a run that is failed: only a run that is done can be verified"),
        ("done", "0", "a run of cafo-tune, and only trainings are made again"),
    ],
)
def test_what_cannot_be_verified_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], state: str | None, step: str, told: str
) -> None:
    if state:
        write_json(tmp_path / "run.json", {"job": "cafo-tune", "state": state, "started": "2026-01-01T00:00:00+00:00"})
    assert main(["verify", str(tmp_path), "--step", step]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_a_training_is_repeated_to_the_bit_and_what_was_changed_is_named(
    cluster: None, tiny_base: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One number of the last checkpoint is changed, so that it looks whole, and one byte of another file."""
    arguments = [f"base.path={tiny_base}", f"data.path=[{records}]", "data.max_length=200", "data.val_fraction=0"]
    arguments += ["adapter.n_layers=2", "train.epochs=1", "train.global_batch=10", "train.checkpoint_every_steps=4"]
    assert main(["adapter-train", *arguments, f"run.storage={tmp_path}", "run.name=r"]) == 0
    folder = tmp_path / "r"
    steps = read_jsonl(folder / "metrics.jsonl")[-1]["step"]
    newest, before = list_checkpoints(f"{folder}/train")
    assert (read_checkpoint(newest).step, read_checkpoint(before).step) == (steps, 8)
    content = read_checkpoint(newest)
    name = next(name for name in content.state if name.endswith(".exp_avg"))
    content.state[name].view(-1)[3] += 1
    for file in Path(newest.path).iterdir():
        file.unlink()
    Path(newest.path).rmdir()
    write_checkpoint(f"{folder}/train", content)
    versions = folder / "versions.json"
    versions.write_bytes(versions.read_bytes().replace(b"python", b"Python", 1))
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 1
    at = f"train/{Path(newest.path).name}"
    size = content.state[name].numel()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        f"{at}/{file}: its bytes have changed since the run ended" for file in ("position.json", "state.safetensors")
    ] + ["versions.json: its bytes have changed since the run ended"]
    assert lines[3:] == [f"steps 9 to {steps}, made again: {name} differs in 1 of {size} values, by at most 1"]
    assert {one.name for one in (tmp_path / "cache").iterdir()} == {"tokens"}, "nothing of it is left"
