"""Runs that are cut off: whatever dies, the same command ends with the adapter of the undisturbed run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter.adapter_formats import read_adapter
from adapter.records.encoding import encode_record
from adapter.tokenizers.load import load_tokenizer
from rayjobs.__main__ import main
from rayjobs.storage.files import read_jsonl
from tests.conftest import ROOT
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.ray


class Runs:
    """adapter-train as a user runs it, in processes of its own; every epoch shows other views of the images."""

    def __init__(self, storage: Path, base: Path, records: Path, vision: list[str]) -> None:
        self.storage = storage
        self.arguments = [
            "adapter-train",
            f"base.path={base}",
            f"data.path=[{records}]",
            "data.val_fraction=0",
            "data.max_length=200",
            "adapter.n_layers=2",
            "adapter.prompt_length=5",
            *vision,
            "vision.mode=streamed",
            "vision.augment=true",
            "train.epochs=9",
            "train.global_batch=5",
            "train.token_budget=600",
            "train.checkpoint_every_steps=40",
            f"run.storage={storage}",
        ]

    def start(self, name: str, *more: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return subprocess.Popen(
            [sys.executable, "-m", "rayjobs", *self.arguments, f"run.name={name}", *more],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def wait_for_step(self, name: str, step: int, process: subprocess.Popen[str]) -> None:
        """Waits until this process has written a row of at least this step."""
        metrics = self.storage / name / "metrics.jsonl"
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        deadline = time.monotonic() + PATIENCE_S

        def last() -> int:
            """The last step; 0 where there is none, as when the next driver begins anew."""
            if not metrics.exists() or metrics.stat().st_mtime_ns == before:
                return 0
            rows = read_jsonl(metrics)
            return int(rows[-1]["step"]) if rows else 0

        while last() < step:
            assert process.poll() is None, process.communicate()[1][-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def weights(self, name: str) -> torch.Tensor:
        file = read_adapter(self.storage / name / "adapter.safetensors")
        return torch.cat([tensor.flatten() for tensor in (file.prompt, file.gate, *file.projection.values())])

    def is_as_undisturbed(self, name: str) -> None:
        steps, undisturbed = (
            [row["step"] for row in read_jsonl(self.storage / run / "metrics.jsonl")] for run in (name, "undisturbed")
        )
        assert steps == undisturbed, "each step once in the metrics"
        torch.testing.assert_close(self.weights(name), self.weights("undisturbed"), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def runs(
    cluster: None, tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, pictured: Path, vision: list[str]
) -> Runs:
    return Runs(tmp_path_factory.mktemp("faults"), tiny_base, pictured, vision)


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> None:
    """The run that every disturbed one is compared with."""
    assert main([*runs.arguments, "run.name=undisturbed", "scale.workers=2"]) == 0


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_goes_on_by_itself(runs: Runs, undisturbed: None) -> None:
    process = runs.start("worker-killed", "scale.workers=2")
    runs.wait_for_step("worker-killed", 60, process)
    family = psutil.Process(process.pid).children(recursive=True)
    next(child for child in family if "RayTrainWorker" in " ".join(child.cmdline())).kill()
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors[-2000:]
    told = r"train: (a worker|2 workers) died \(.+\) after step \d+; going on from step [1-9]\d*"
    assert re.search(told, errors), errors
    runs.is_as_undisturbed("worker-killed")


@pytest.mark.slow
def test_a_run_cut_off_twice_resumes_with_the_same_command_on_other_workers(
    runs: Runs, undisturbed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver is killed outright, the next one is interrupted by Ctrl-C, one finds no checkpoint that it can read,
    the last comes to the end."""
    process = runs.start("cut-off", "scale.workers=2")
    runs.wait_for_step("cut-off", 50, process)
    process.kill()
    process.communicate()
    process = runs.start("cut-off", "scale.workers=1")
    runs.wait_for_step("cut-off", 100, process)
    processes = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, errors[-2000:]
    assert "the same command resumes it" in errors
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE_S)
    assert not alive, f"stray processes: {alive}"
    assert not (runs.storage / "cut-off" / "adapter.safetensors").exists()

    states = {path: path.read_bytes() for path in (runs.storage / "cut-off" / "train").glob("checkpoint_*/state.*")}
    for path in states:
        os.truncate(path, 90)
    before = (runs.storage / "cut-off" / "metrics.jsonl").read_bytes()
    assert main([*runs.arguments, "run.name=cut-off", "scale.workers=2", "scale.max_failures=-1"]) == 2
    errors = capsys.readouterr().err
    # A checkpoint that was written but not yet registered when Ctrl-C came has a folder and is not counted.
    assert re.search(r"none of the [1-9]\d* checkpoints can be read", errors), errors
    assert (runs.storage / "cut-off" / "metrics.jsonl").read_bytes() == before
    for path, content in states.items():
        path.write_bytes(content)

    assert main([*runs.arguments, "run.name=cut-off", "scale.workers=2"]) == 0
    runs.is_as_undisturbed("cut-off")


def test_a_loss_that_is_not_finite_stops_with_step_rate_and_records(
    runs: Runs, tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned = tmp_path / "base"
    poisoned.mkdir()
    for path in tiny_base.iterdir():
        (poisoned / path.name).write_bytes(path.read_bytes())
    tensors = load_file(poisoned / "model.safetensors")
    tensors["lm_head.weight"][:] = torch.finfo(torch.float32).max
    save_file(tensors, poisoned / "model.safetensors")
    arguments = [*runs.arguments, "run.name=poisoned", f"base.path={poisoned}", "scale.workers=2"]
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "the loss became nan at step 1 (lr " in line
    ids = json.loads(line.split("records with ids ")[1].split("]")[0] + "]")
    assert len(ids) == 5
    assert len(set(ids)) == 5
    assert not (runs.storage / "poisoned" / "adapter.safetensors").exists()


@pytest.mark.slow
def test_after_a_loss_that_was_not_finite_a_lower_rate_goes_on_from_the_last_checkpoint(
    cluster: None, tmp_path: Path, tiny_base: Path, records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One token of one record has weights too large to compute with, so the run stops at this record at any rate."""
    base, lines = tmp_path / "base", records.read_text().splitlines()
    shutil.copytree(tiny_base, base)
    tokenizer = load_tokenizer(base / "tokenizer.model")
    examples = [encode_record({"image": "", **json.loads(line)}, tokenizer, max_length=200) for line in lines]
    ids = [set(example.ids) for example in examples]
    token = min(set.union(*ids), key=lambda id: sum(id in some for some in ids))
    chosen = [line for line, some in zip(lines, ids, strict=True) if token not in some]
    chosen.append(next(line for line, some in zip(lines, ids, strict=True) if token in some))
    (tmp_path / "records.jsonl").write_text("\n".join(chosen) + "\n")
    tensors = load_file(base / "model.safetensors")
    largest = torch.tensor([1.0, -1.0]).repeat(12) * torch.finfo(torch.float32).max
    tensors["model.embed_tokens.weight"][token] = largest  # the sum with the first attention's output overflows
    tensors["model.layers.0.self_attn.o_proj.weight"] *= 1e37
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    arguments = [
        "adapter-train",
        f"base.path={base}",
        f"data.path=[{tmp_path / 'records.jsonl'}]",
        "data.val_fraction=0",
        "data.max_length=200",
        "adapter.n_layers=2",
        "train.epochs=1",
        "train.warmup_epochs=0",
        "train.global_batch=5",
        "train.checkpoint_every_steps=1",
        "scale.workers=1",
        f"run.storage={tmp_path}",
        "run.name=r",
    ]
    metrics = tmp_path / "r" / "metrics.jsonl"

    def stop(*more: str) -> str:
        assert main([*arguments, *more]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        return line

    first = stop()
    step = int(first.split(" at step ")[1].split()[0])
    assert step > 1, "there is a checkpoint"
    assert "With a lower optimizer.base_lr, or with optimizer.clip_norm, the same command goes on " in first
    rows = read_jsonl(metrics)
    assert "(train.global_batch was 5, now 6)" in stop("train.global_batch=6", "optimizer.base_lr=1e-4")
    lower = stop("optimizer.base_lr=1e-4", "optimizer.clip_norm=1")
    assert f" at step {step} (lr " in lower
    assert float(lower.split("(lr ")[1].split(")")[0]) < float(first.split("(lr ")[1].split(")")[0])
    assert read_jsonl(metrics) == rows, "it went on from the last checkpoint, whose steps are not made again"
    (change,) = json.loads((tmp_path / "r" / "provenance.json").read_text())["changed_settings"]
    assert change["changes"] == [["optimizer.base_lr", 9e-3, 1e-4], ["optimizer.clip_norm", None, 1.0]]
    assert f"step {step}" in change["after"]
