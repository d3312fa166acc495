"""Runs that are cut off: whatever dies, the same command ends with the adapter of the undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from adapter.checkpoint import read_adapter
from rayjobs.tables import read_jsonl
from tests.conftest import ROOT

pytestmark = pytest.mark.ray


class Runs:
    """adapter-train as a user runs it, in processes of its own."""

    def __init__(self, storage: Path, base: Path, records: Path) -> None:
        self.storage = storage
        self.command = [
            sys.executable,
            "-m",
            "rayjobs",
            "adapter-train",
            f"base.path={base}",
            f"data.path=[{records}]",
            "data.val_fraction=0",
            "data.max_length=200",
            "adapter.n_layers=2",
            "adapter.prompt_length=5",
            "train.epochs=8",
            "train.global_batch=5",
            "train.token_budget=600",
            "train.checkpoint_every_steps=40",
            f"run.storage={storage}",
        ]

    def start(self, name: str, *more: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return subprocess.Popen(
            [*self.command, f"run.name={name}", *more],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def finish(self, name: str, *more: str) -> str:
        process = self.start(name, *more)
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-2000:]
        return errors

    def wait_for_step(self, name: str, step: int, process: subprocess.Popen[str]) -> None:
        metrics = self.storage / name / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not metrics.exists() or not (rows := read_jsonl(metrics)) or rows[-1]["step"] < step:
            assert process.poll() is None, process.communicate()[1][-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def weights(self, name: str) -> torch.Tensor:
        file = read_adapter(self.storage / name / "adapter.safetensors")
        return torch.cat([file.prompt.flatten(), file.gate.flatten()])

    def steps(self, name: str) -> list[int]:
        return [row["step"] for row in read_jsonl(self.storage / name / "metrics.jsonl")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, records: Path) -> Runs:
    made = Runs(tmp_path_factory.mktemp("faults"), tiny_base, records)
    made.finish("undisturbed", "scale.workers=2")
    return made


def kill_worker(process: subprocess.Popen[str]) -> None:
    family = psutil.Process(process.pid).children(recursive=True)
    worker = next(child for child in family if "RayTrainWorker" in " ".join(child.cmdline()))
    worker.kill()


def kill_driver(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def interrupt(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors[-2000:]
    assert "the same command resumes it" in errors


@pytest.mark.parametrize(
    ("disturb", "workers_after"),
    [(kill_worker, None), (kill_driver, 1), (interrupt, 2)],
    ids=["worker-killed", "driver-killed", "interrupted"],
)
def test_a_disturbed_run_ends_as_the_undisturbed(
    runs: Runs, request: pytest.FixtureRequest, disturb: Callable, workers_after: int | None
) -> None:
    name = request.node.callspec.id
    process = runs.start(name, "scale.workers=2")
    family = psutil.Process(process.pid)
    runs.wait_for_step(name, 60, process)
    processes = family.children(recursive=True)
    disturb(process)
    if workers_after is None:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-2000:]
    else:
        _, alive = psutil.wait_procs(processes, timeout=30)
        # Ray's agents notice only after minutes that a driver was killed outright; nothing may outlive Ctrl-C.
        assert not alive or disturb is kill_driver, f"stray processes: {alive}"
        assert not (runs.storage / name / "adapter.safetensors").exists()
        runs.finish(name, f"scale.workers={workers_after}")
    assert runs.steps(name) == list(range(1, runs.steps("undisturbed")[-1] + 1)), "each step once in the metrics"
    torch.testing.assert_close(runs.weights(name), runs.weights("undisturbed"), rtol=0, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_with_step_rate_and_records(
    runs: Runs, tmp_path: Path, tiny_base: Path
) -> None:
    from safetensors.torch import load_file, save_file

    poisoned = tmp_path / "base"
    poisoned.mkdir()
    for path in tiny_base.iterdir():
        (poisoned / path.name).write_bytes(path.read_bytes())
    tensors = load_file(poisoned / "model.safetensors")
    tensors["model.embed_tokens.weight"][:] = float("nan")
    save_file(tensors, poisoned / "model.safetensors")
    process = runs.start("poisoned", f"base.path={poisoned}", "scale.workers=2")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 2
    (line,) = [line for line in errors.splitlines() if "error:" in line]
    assert "the loss became nan at step 1 (lr " in line
    ids = json.loads(line.split("records with ids ")[1].split("]")[0] + "]")
    assert len(ids) == 5
    assert len(set(ids)) == 5
    assert not (runs.storage / "poisoned" / "adapter.safetensors").exists()
