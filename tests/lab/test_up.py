"""The shipped on-premises cluster, really brought up: jobs are submitted to it, stopped and resumed."""

import json
from pathlib import Path

import torch

from rayjobs.tables import read_json
from tests.lab.cluster import HEAD, Cluster, Training
from tests.rayjobs.cafo_world import world


def test_an_adapter_is_trained_on_two_hosts(undisturbed: Training) -> None:
    result = read_json(undisturbed.folder / "result.json")
    assert result["steps"] == undisturbed.steps()[-1]
    assert torch.isfinite(undisturbed.weights()).all()


def test_a_sweep_runs_beside_it(onprem: Cluster) -> None:
    settings = [
        *world(onprem.shared / "cafo", {"train": 20, "val": 20, "test": 5}),
        "run.name=sweep",
        "space.shots=[1,4]",
        "space.seeds=[1,2,3]",
        "space.epochs=[20]",
        "search.beta_steps=20",
        "scale.workers=2",
        "trials.workers=3",
        "trials.cpus_per_worker=1.5",
    ]
    with onprem.timed("cafo-tune: 6 trials, features encoded first"):
        process = onprem.submit("cafo-tune", *settings)
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-4000:]
    result = json.loads((onprem.shared / "cafo" / "runs" / "sweep" / "result.json").read_text())
    assert result["trials"] == 6


def test_a_stopped_job_leaves_no_process_and_is_resumed(onprem: Cluster, undisturbed: Training, shared: Path) -> None:
    run = Training(onprem, shared, "stopped")
    run.submit()
    run.wait_for_step(60)
    mark = run.mark()
    with onprem.timed("ray job stop, until the workers are gone"):
        job = onprem.running()
        onprem.on_dashboard("ray", "job", "stop", job)
        onprem.wait_for(lambda: not run.workers_on(), "the workers' end", 60)
    assert not onprem.processes(HEAD, "-m rayjobs")
    run.end()
    assert not (run.folder / "adapter.safetensors").exists()
    run.submit()
    run.goes_on(mark, "stopped and submitted again")
    run.ends_well()
    run.is_as(undisturbed)
