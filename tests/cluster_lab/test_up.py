"""The shipped on-premises cluster, really brought up: jobs are submitted to it, stopped and resumed."""

from pathlib import Path

import torch

from rayjobs.storage.files import read_json
from tests.cluster_lab.cluster import HEAD, WORKERS, Cluster
from tests.cluster_lab.runs import Sweep, Training


def test_an_adapter_is_trained_on_two_hosts(undisturbed: Training) -> None:
    result = read_json(undisturbed.folder / "result.json")
    assert result["steps"] == undisturbed.steps()[-1]
    assert torch.isfinite(undisturbed.weights()).all()


def test_a_sweep_runs_too(calm_sweep: Sweep) -> None:
    assert len(calm_sweep.rows()) == 6


def test_folders_of_one_host_alone_are_refused(onprem: Cluster) -> None:
    run = Training(onprem, "apart", storage=Path("/root/runs"))
    run.submit()
    code, output = run.end()
    assert code == 2
    (line,) = [line for line in output.splitlines() if "error:" in line]
    assert "/root/runs/apart is not the same folder on" in line
    assert all(onprem.hosts.address(worker) in line for worker in WORKERS)


def test_a_stopped_job_leaves_no_process_and_is_resumed(onprem: Cluster, undisturbed: Training) -> None:
    run = Training(onprem, "stopped")
    run.submit()
    run.wait_for_step(60)
    mark = run.mark()
    with onprem.timed("ray job stop, until the workers are gone"):
        job = onprem.running()
        onprem.on_dashboard("ray", "job", "stop", job)
        onprem.wait_for(lambda: not run.workers_on(), "the workers' end", 60)
    assert not onprem.processes(HEAD, "-m rayjobs")
    code, _ = run.end()
    assert code == 143
    assert read_json(run.folder / "run.json")["state"] == "interrupted"
    assert not (run.folder / "adapter.safetensors").exists()
    run.submit()
    run.goes_on(mark, "stopped and submitted again")
    run.ends_well()
    run.is_as(undisturbed)
