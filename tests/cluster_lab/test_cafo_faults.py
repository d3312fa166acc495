"""Jobs of CaFo whose machines fail in the middle of their work: each ends with what the undisturbed run came to."""

import pytest

from tests.cluster_lab.cluster import WORKERS, Cluster
from tests.cluster_lab.machine_faults import no_memory_left
from tests.cluster_lab.runs import CafoRun, Encoding, Labelling, Sweep

JOBS = [("calm_encoding", Encoding), ("calm_labelling", Labelling)]


@pytest.mark.parametrize(
    ("what", "actor", "first"),
    [("encoding", "PartEncoder", "features/*/part-*"), ("trials", "ImplicitFunc", "trials/*/result.json")],
)
def test_worker_host_without_power_in_a_sweep(
    onprem: Cluster, calm_sweep: Sweep, what: str, actor: str, first: str
) -> None:
    run = Sweep(onprem, what)
    run.submit()
    onprem.wait_for(lambda: any([*run.cache.glob(first), *run.folder.glob(first)]), what, 300)
    host = next(host for host in WORKERS if onprem.processes(host, actor))
    with onprem.timed(f"worker host without power during {what}, until the sweep is over"):
        onprem.hosts.power_off(host)
        run.ends_well()
    run.is_as(calm_sweep)
    onprem.hosts.power_on(host)
    onprem.wait_for(lambda: onprem.alive() == 3, "the third node", 240)


@pytest.mark.parametrize(("calm", "kind"), JOBS, ids=["features", "predict"])
def test_worker_host_without_power(
    onprem: Cluster, calm: str, kind: type[CafoRun], request: pytest.FixtureRequest
) -> None:
    undisturbed = request.getfixturevalue(calm)
    run = kind(onprem, f"{kind.JOB}-host")
    run.submit()
    run.wait_for_parts(4, "the first parts")
    host = next(host for host in run.workers_on() if host in WORKERS)
    with onprem.timed(f"{kind.JOB}: worker host without power, until all was over"):
        onprem.hosts.power_off(host)
        assert len(run.parts()) < len(undisturbed.parts()), "in the middle"
        run.ends_well()
    run.is_as(undisturbed)
    onprem.hosts.power_on(host)
    onprem.wait_for(lambda: onprem.alive() == 3, "the third node", 240)


@pytest.mark.parametrize(("calm", "kind"), [*JOBS, ("calm_sweep", Sweep)], ids=["features", "predict", "tune"])
def test_worker_killed_for_memory(
    onprem: Cluster, calm: str, kind: type[CafoRun], request: pytest.FixtureRequest
) -> None:
    undisturbed = request.getfixturevalue(calm)
    run = kind(onprem, f"{kind.JOB}-memory")
    run.submit()
    run.wait_for_parts(1, "the first part")
    with no_memory_left() as limit, onprem.timed(f"{kind.JOB}: worker killed for want of memory, until all was over"):
        limit.add(next(iter(run.workers_on().values())).pid)
        onprem.wait_for(lambda: limit.killed() > 0, "the kernel to kill the worker", 60)
        assert len(run.parts()) < len(undisturbed.parts()), "in the middle"
        run.ends_well()
    run.is_as(undisturbed)
