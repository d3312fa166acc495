"""Machines, links and disks that fail in the middle of training: each run ends with the undisturbed one's adapter."""

import os
import re
import time

from tests.cluster_lab.cluster import HEAD, WORKERS, Cluster
from tests.cluster_lab.conftest import MIDDLE
from tests.cluster_lab.runs import STUCK_S, Training


def test_worker_process_killed(run: Training, undisturbed: Training) -> None:
    mark = run.mark()
    next(iter(run.workers_on().values())).kill()
    run.goes_on(mark, "worker process killed")
    run.ends_well()
    run.is_as(undisturbed)


def test_worker_host_without_power(onprem: Cluster, run: Training, undisturbed: Training) -> None:
    mark = run.mark()
    host = next(host for host in run.workers_on() if host in WORKERS)
    onprem.hosts.power_off(host)
    run.goes_on(mark, "worker host without power")
    onprem.hosts.power_on(host)
    with onprem.timed("the host switched on again, until Ray has it back"):
        onprem.wait_for(lambda: onprem.alive() == 3, "the third node", 240)
    run.ends_well()
    run.is_as(undisturbed)


def test_worker_host_drained_and_then_without_power(onprem: Cluster, run: Training, undisturbed: Training) -> None:
    """As a spot machine is after its notice. No checkpoint is due but those that the notice makes."""
    notice_s, host = 10, next(host for host in run.workers_on() if host in WORKERS)
    onprem.drain(host, notice_s)
    onprem.wait_for(lambda: run.checkpoints()[-1][0] % 25 != 0, "a checkpoint beside the regular ones", notice_s)
    time.sleep(notice_s - 1)
    mark = run.mark()
    onprem.hosts.power_off(host)
    run.goes_on(mark, "worker host drained, and without power 10 s later")
    onprem.hosts.power_on(host)
    with onprem.timed("the drained host switched on again, until Ray has it back"):
        onprem.wait_for(lambda: onprem.alive() == 3, "the third node", 240)
    told = run.ends_well()
    assert re.search(r"a node will be taken away in \d+ s; every step is saved until then", told), told
    lost = re.findall(r"going on from step \d+(?:, (\d+) steps? (?:is|are) lost)?$", told, re.MULTILINE)
    assert [int(steps or 0) <= 1 for steps in lost] == [True], told
    run.is_as(undisturbed)


def test_link_cut_for_half_a_minute(onprem: Cluster, run: Training, undisturbed: Training) -> None:
    mark = run.mark()
    host = next(host for host in run.workers_on() if host in WORKERS)
    onprem.hosts.link(host, "down")
    time.sleep(30)
    onprem.hosts.link(host, "up")
    run.goes_on(mark, "link cut for 30 s")
    run.ends_well()
    run.is_as(undisturbed)


def test_fewer_workers_while_a_host_is_off(onprem: Cluster) -> None:
    run, began = Training(onprem, "elastic"), time.monotonic()
    run.submit("scale.workers={min: 1, max: 3}", "scale.grow_every_s=5", "train.epochs=1000")
    run.wait_for_step(MIDDLE)
    run.wait_for_workers(3, f"elastic: submitted, until three workers are past step {MIDDLE}", began)
    host, began = WORKERS[0], time.monotonic()
    onprem.hosts.power_off(host)
    run.wait_for_workers(2, "elastic: a host without power, until two go on", began)
    began = time.monotonic()
    onprem.hosts.power_on(host)
    run.wait_for_workers(3, "elastic: switched on again, until three go on", began)
    steps = run.steps()
    assert steps == list(range(1, len(steps) + 1)), "each step once"
    onprem.on_dashboard("ray", "job", "stop", onprem.running())
    run.end()


def test_driver_on_the_head_killed(onprem: Cluster, run: Training, undisturbed: Training) -> None:
    mark = run.mark()
    for driver in run.drivers():
        driver.kill()
    code, _ = run.end()
    assert code != 0
    run.submit()
    run.goes_on(mark, "driver on the head killed, and submitted again")
    run.ends_well()
    run.is_as(undisturbed)


def test_driver_killed_and_a_worker_host_without_power_at_once(
    onprem: Cluster, run: Training, undisturbed: Training
) -> None:
    """The job is submitted again while the host is still off."""
    mark = run.mark()
    host = next(host for host in run.workers_on() if host in WORKERS)
    onprem.hosts.power_off(host)
    for driver in run.drivers():
        driver.kill()
    code, _ = run.end()
    assert code != 0
    run.submit()
    run.goes_on(mark, "driver killed and a worker host without power at once, and submitted again")
    onprem.hosts.power_on(host)
    run.ends_well()
    run.is_as(undisturbed)
    onprem.wait_for(lambda: onprem.alive() == 3, "the third node", 240)


def test_head_without_power(onprem: Cluster, run: Training, undisturbed: Training) -> None:
    """It is switched on again, without Ray; `ray up` and the same submission resume the run."""
    mark = run.mark()
    onprem.hosts.power_off(HEAD)
    onprem.hosts.power_on(HEAD)
    with onprem.timed("head without power for a moment, until the submission has ended"):
        code, output = run.end()
    assert code != 0, output[-4000:]
    onprem.up()
    run.submit()
    run.goes_on(mark, "head without power, switched on, ray up, and submitted again", seconds=2 * STUCK_S)
    run.ends_well()
    run.is_as(undisturbed)


def test_newest_checkpoint_truncated(run: Training, undisturbed: Training) -> None:
    mark = run.mark()
    _, newest = run.checkpoints()[-1]
    os.truncate(newest / "state.safetensors", 1000)
    next(iter(run.workers_on().values())).kill()
    run.goes_on(
        mark._replace(checkpoint_step=run.checkpoints()[-2][0]), "newest checkpoint truncated, worker process killed"
    )
    run.ends_well()
    run.is_as(undisturbed)


def test_disk_full(onprem: Cluster, undisturbed: Training) -> None:
    run = Training(onprem, "full", storage=onprem.small)
    run.submit()
    run.wait_for_step(MIDDLE)
    mark = run.mark()
    filler = onprem.small / "filler"
    with filler.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(1024))
            except OSError:
                break
    with onprem.timed("disk full, until the run has stopped"):
        code, output = run.end()
    assert code == 2
    (line,) = [line for line in output.splitlines() if "error:" in line]
    assert "No space left on device" in line
    filler.unlink()
    run.submit()
    run.goes_on(mark, "disk full, freed, and submitted again")
    run.ends_well()
    run.is_as(undisturbed)
