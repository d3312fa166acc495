"""Sweeps that are disturbed: whatever dies, and whoever else runs, they end with the undisturbed sweep's results."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from rayjobs.config import load
from rayjobs.jobs import cafo_tune
from rayjobs.storage.files import read_json
from tests.conftest import ROOT
from tests.rayjobs.cafo_dataset import make_dataset
from tests.waiting import PATIENCE_S, wait_until

pytestmark = pytest.mark.ray

SWEEP = ["features.views=8", "space.shots=[6]", "space.seeds=[0,1]", "space.generated=[0,2]", "space.lr=[1e-3,1e-2]"]
SWEEP += ["space.epochs=[60]", "search.beta_steps=20"]


class Sweeps:
    def __init__(self, folder: Path) -> None:
        self.given = [*make_dataset(folder), *SWEEP]
        self.runs = folder / "runs"

    def config(self, name: str, *more: str) -> cafo_tune.Config:
        return load(cafo_tune.Config, None, [*self.given, f"run.name={name}", *more])

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """A sweep as a user starts it, on a cluster of its own."""
        command = [sys.executable, "-m", "rayjobs", "cafo-tune", *self.given, f"run.name={name}"]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)

    def finished(self, name: str) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in self.runs.glob(f"{name}/trials/*/result.json")}

    def found(self, name: str) -> tuple[Any, Any]:
        """What a sweep came to, the time it took apart."""
        rows = pq.read_table(self.runs / name / "results.parquet").to_pylist()
        return [row | {"seconds": 0} for row in rows], read_json(self.runs / name / "chosen.json")


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Sweeps:
    made = Sweeps(tmp_path_factory.mktemp("faults"))
    cafo_tune.run(made.config("undisturbed"))
    return made


class Kill(threading.Thread):
    """Kills one worker of this process's cluster, by what it runs, as soon as the time has come."""

    def __init__(self, runs: str, ready: Callable[[], bool]) -> None:
        super().__init__(daemon=True)
        self.runs, self.ready, self.killed = runs, ready, 0
        self.start()

    def run(self) -> None:
        wait_until(self.ready, "the time to kill", pause_s=0.01)
        for process in psutil.Process().children(recursive=True):
            try:
                if not self.killed and self.runs in " ".join(process.cmdline()):
                    process.kill()
                    self.killed = process.pid
            except psutil.NoSuchProcess:
                continue


@pytest.mark.slow
def test_a_killed_encoder_and_a_killed_trial_change_nothing(sweeps: Sweeps) -> None:
    config = sweeps.config("killed-workers", f"run.cache={sweeps.runs / 'own'}")
    encoder = Kill("PartEncoder", lambda: len(list((sweeps.runs / "own").glob("features/*/*.parquet"))) >= 2)
    trial = Kill("ray::ImplicitFunc", lambda: len(sweeps.finished("killed-workers")) >= 2)
    cafo_tune.run(config)
    assert encoder.killed
    assert trial.killed
    assert sweeps.found("killed-workers") == sweeps.found("undisturbed")


@pytest.mark.slow
def test_a_killed_sweep_goes_on_beside_another_on_the_same_store(sweeps: Sweeps) -> None:
    process = sweeps.start("killed-driver")
    wait_until(lambda: len(sweeps.finished("killed-driver")) >= 2, "two finished trials", pause_s=0.01)
    process.kill()
    process.wait()
    kept = sweeps.finished("killed-driver")
    assert 2 <= len(kept) < 8
    shutil.rmtree(sweeps.runs / "cache")  # so that both make the store, at the same time
    process = sweeps.start("killed-driver")
    cafo_tune.run(sweeps.config("beside"))
    assert process.wait(PATIENCE_S) == 0
    assert sweeps.found("beside") == sweeps.found("killed-driver") == sweeps.found("undisturbed")
    now = sweeps.finished("killed-driver")
    assert {path: now[path] for path in kept} == kept, "no finished trial is run again"
