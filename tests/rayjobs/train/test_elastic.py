"""A run between bounds of workers: it goes on with fewer when a node is lost, and grows back when one comes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from rayjobs.cluster.worker_pool import WorkerPoolConfig, WorkerRange
from rayjobs.config import load
from rayjobs.errors import ConfigError
from rayjobs.storage.files import read_jsonl
from tests.conftest import ROOT
from tests.waiting import PATIENCE_S, wait_until

CPUS = 2
"""Of each node; a worker takes more than half of them, so that two workers need two nodes."""


def test_a_number_is_short_for_equal_bounds() -> None:
    assert load(WorkerPoolConfig, {"workers": 3}).workers == WorkerRange(min=3, max=3)
    assert load(WorkerPoolConfig, {"workers": {"min": 1, "max": 3}}, ["workers.max=5"]).workers == WorkerRange(
        min=1, max=5
    )
    for wrong, told in (
        (0, "workers.min: must be greater than or equal to 1, got 0"),
        ({"min": 3, "max": 2}, "workers: max is 2, below min, 3"),
        ("many", r"workers: must be a number, or bounds such as {min: 2, max: 8}, got 'many'"),
    ):
        with pytest.raises(ConfigError, match=told):
            load(WorkerPoolConfig, {"workers": wrong})


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster of two nodes, as far as Ray can tell; this process is no part of it."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # whatever the cluster of the tests before asks
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setattr("ray._private.worker._global_node", None)  # nor take its address
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS, "include_dashboard": False})
    yield made
    made.shutdown()


class ElasticRun:
    """adapter-train on one to two nodes, in a process of its own."""

    def __init__(self, nodes: Cluster, base: Path, records: Path, storage: Path, *settings: str) -> None:
        self.metrics = storage / "elastic" / "metrics.jsonl"
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "rayjobs", "adapter-train", f"base.path={base}", f"data.path=[{records}]"),
                *("data.val_fraction=0", "data.max_length=200", "adapter.n_layers=2", "train.epochs=10000"),
                *("train.global_batch=10", "scale.workers={min: 1, max: 2}", "scale.cpus_per_worker=1.5"),
                *("scale.grow_every_s=1", f"run.storage={storage}", "run.name=elastic", *settings),
            ],
            cwd=ROOT,
            env={**os.environ, "RAY_ADDRESS": nodes.address, "RAY_AUTH_MODE": "disabled"},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def rows(self) -> list[dict[str, Any]]:
        return read_jsonl(self.metrics) if self.metrics.exists() else []

    def is_running(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()[1][-2000:]
        return True

    def wait_for(self, workers: list[int]) -> None:
        """Wait until these numbers of workers have made the steps in turn, and the last of them 60 steps."""

        def made() -> bool:
            counts = [row["workers"] for row in self.rows()]
            turns = [now for before, now in zip([None, *counts], counts, strict=False) if now != before]
            return self.is_running() and turns == workers and counts[-60:] == workers[-1:] * 60

        wait_until(made, f"{workers} workers in turn", 0.2)
        rows = self.rows()
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "each step once"

    def interrupt(self) -> str:
        """Stop the run as Ctrl-C does; return what it has written to the terminal."""
        self.process.send_signal(signal.SIGINT)
        return self.process.communicate(timeout=PATIENCE_S)[1]


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_shrinks_and_grows_with_its_cluster(
    nodes: Cluster, tiny_base: Path, records: Path, tmp_path: Path
) -> None:
    lost = nodes.add_node(num_cpus=CPUS)
    run = ElasticRun(nodes, tiny_base, records, tmp_path, "train.checkpoint_every_steps=20")
    try:
        run.wait_for([2])
        nodes.remove_node(lost, allow_graceful=False)
        run.wait_for([2, 1])
        nodes.add_node(num_cpus=CPUS)
        run.wait_for([2, 1, 2])
    finally:
        run.interrupt()
    assert run.process.returncode == 130


@pytest.mark.ray
@pytest.mark.slow
def test_after_a_preemption_notice_the_run_goes_on_from_a_checkpoint_made_in_time(
    nodes: Cluster, tiny_base: Path, records: Path, tmp_path: Path
) -> None:
    """The node is drained as a spot machine is after its notice. No regular checkpoint is due."""
    lost = nodes.add_node(num_cpus=CPUS)
    run = ElasticRun(nodes, tiny_base, records, tmp_path, "train.checkpoint_every_s=null")
    try:
        run.wait_for([2])
        notice_s, noticed_at = 30, time.monotonic()
        subprocess.run(
            [
                *(Path(sys.executable).parent / "ray", "drain-node", f"--address={nodes.address}"),
                *(f"--node-id={lost.node_id}", "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"),
                f"--deadline-remaining-seconds={notice_s}",
            ],
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
            check=True,
            capture_output=True,
        )
        saved = run.metrics.parent / "train"
        wait_until(lambda: run.is_running() and any(saved.glob("checkpoint_*/position.json")), "a checkpoint")
        time.sleep(max(0.0, noticed_at + notice_s + 1 - time.monotonic()))
        nodes.remove_node(lost, allow_graceful=False)
        run.wait_for([2, 1])
    finally:
        told = run.interrupt()
    assert run.process.returncode == 130
    assert re.search(r"train: a node will be taken away in \d+ s; every step is saved until then", told), told
    again = r"(going|went) on from step \d+(, 1 step is lost)?$"
    assert re.search(again, told, re.MULTILINE), told
