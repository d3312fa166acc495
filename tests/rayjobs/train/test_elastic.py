"""A run between bounds of workers: it goes on with fewer when a node is lost, and grows back when one comes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from rayjobs.cluster.worker_pool import WorkerPoolConfig, WorkerRange
from rayjobs.config import load
from rayjobs.errors import ConfigError
from rayjobs.storage.files import read_jsonl
from tests.conftest import ROOT
from tests.waiting import PATIENCE_S

CPUS = 2
"""Of each node; a worker takes more than half of them, so that two workers need two nodes."""


def test_a_number_is_short_for_equal_bounds() -> None:
    assert load(WorkerPoolConfig, {"workers": 3}).workers == WorkerRange(min=3, max=3)
    assert load(WorkerPoolConfig, {"workers": {"min": 1, "max": 3}}, ["workers.max=5"]).workers == WorkerRange(
        min=1, max=5
    )
    for wrong, told in (
        (0, "workers.min: Input should be greater than or equal to 1, got 0"),
        ({"min": 3, "max": 2}, "workers: max is 2, below min, 3"),
        ("many", r"workers: must be a number, or bounds such as {min: 2, max: 8}, got 'many'"),
    ):
        with pytest.raises(ConfigError, match=told):
            load(WorkerPoolConfig, {"workers": wrong})


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A cluster of two nodes, as far as Ray can tell; this process is no part of it."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS, "include_dashboard": False})
    yield made
    made.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_shrinks_and_grows_with_its_cluster(
    nodes: Cluster, tiny_base: Path, records: Path, tmp_path: Path
) -> None:
    metrics = tmp_path / "elastic" / "metrics.jsonl"
    lost = nodes.add_node(num_cpus=CPUS)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "rayjobs", "adapter-train", f"base.path={tiny_base}", f"data.path=[{records}]"),
            *("data.val_fraction=0", "data.max_length=200", "adapter.n_layers=2", "train.epochs=10000"),
            *("train.global_batch=10", "train.checkpoint_every_steps=20", "scale.workers={min: 1, max: 2}"),
            *("scale.cpus_per_worker=1.5", "scale.grow_every_s=1", f"run.storage={tmp_path}", "run.name=elastic"),
        ],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": nodes.address, "RAY_AUTH_MODE": "disabled"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )

    def wait_for(workers: list[int]) -> None:
        """Until the metrics' steps, some checkpoints of them by the last, were made by so many workers in turn."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            rows = read_jsonl(metrics) if metrics.exists() else []
            seen = [row["workers"] for row in rows]
            turns = [now for before, now in zip([None, *seen], seen, strict=False) if now != before]
            if turns == workers and seen[-60:] == workers[-1:] * 60:
                break
            assert process.poll() is None, process.communicate()[1][-2000:]
            assert time.monotonic() < deadline, f"{turns}, not {workers}"
            time.sleep(0.2)
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "each step once"

    try:
        wait_for([2])
        nodes.remove_node(lost, allow_graceful=False)
        wait_for([2, 1])
        nodes.add_node(num_cpus=CPUS)
        wait_for([2, 1, 2])
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
