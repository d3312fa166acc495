"""Training on machines that misbehave without being lost: memory, disk, clock. It ends with the undisturbed adapter."""

from contextlib import ExitStack

from tests.cluster_lab.cluster import WORKERS, Cluster
from tests.cluster_lab.conftest import MIDDLE
from tests.cluster_lab.machine_faults import HostClock, no_memory_left
from tests.cluster_lab.runs import Training


def test_worker_killed_for_memory(onprem: Cluster, run: Training, undisturbed: Training) -> None:
    with no_memory_left() as limit:
        mark = run.mark()
        limit.add(next(iter(run.workers_on().values())).pid)
        onprem.wait_for(lambda: limit.killed() > 0, "the kernel to kill the worker", 60)
        run.goes_on(mark, "worker killed by the kernel for want of memory")
    run.ends_well()
    run.is_as(undisturbed)


def test_clocks_jump_an_hour(onprem: Cluster, undisturbed: Training) -> None:
    """Forward on one worker host, back on the other, while the head's stays right."""
    with ExitStack() as clocks:
        forward, back = (clocks.enter_context(HostClock(onprem, host)) for host in WORKERS)
        run = Training(onprem, "clocks")
        run.submit()
        run.wait_for_step(MIDDLE)
        assert run.workers_on().keys() & set(WORKERS)
        mark = run.mark()
        forward.set(3600)
        back.set(-3600)
        assert forward.now() - back.now() > 7000
        run.keeps_on(mark, "clocks of the worker hosts an hour forward and an hour back")
        run.ends_well()
    run.is_as(undisturbed)


def test_disk_becomes_slow(onprem: Cluster, undisturbed: Training) -> None:
    """The disk of the run's folder writes 20 kB/s; a checkpoint has some 50 kB."""
    run = Training(onprem, "slow", storage=onprem.slow.folder)
    run.submit()
    run.wait_for_step(MIDDLE)
    with onprem.slow.limited_to(20_000):
        run.keeps_on(run.mark(), "disk of the run's folder at 20 kB/s")  # the checkpoints of steps 75 and 100
        assert run.checkpoints()[-1][0] >= 75
    run.ends_well()
    run.is_as(undisturbed)
