"""Run jobs one after the other on the cluster of this folder while something fails every minute, drawn by a seed.

    python -m tests.cluster_lab.random_faults [--minutes 60] [--every 60] [--seed 1] [--out build/random_faults.jsonl]

A training, a sweep and the labelling of images take turns for as long as the time allows. Each run's result is compared
with that of an undisturbed one, and then its folder is deleted. A submission that ends early is made again, as a user
would; Ray on a host that was off is started by Ray itself. The training recovers from any number of failures, and has a
checkpoint every 5 steps, since it needs about as long to go on after a lost host as it has until the next fault.

The file has a line for every fault, with the memory and the open files of the head's own processes of Ray, and a line
for every run. The head does not fail here: whether its processes grow could not be seen then.
"""

import argparse
import json
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import psutil

from tests.cluster_lab.cluster import HEAD, WORKERS, Cluster
from tests.cluster_lab.hosts import lacking
from tests.cluster_lab.machine_faults import no_memory_left
from tests.cluster_lab.runs import Labelling, Run, Sweep, Training
from tests.conftest import ROOT

KINDS: Sequence[Callable[[Cluster, str], Run]] = (Training, Sweep, Labelling)
OFF_S, CUT_S, NOTICE_S = 15, 30, 10
"""Seconds that a host is off, that a link is cut, and that a host is given until it is taken away."""
BACK_S = 150
"""Ray is started by hand on a host that has been on for so long without it."""
LONGEST_RUN_S = 3600
OF_THE_HEAD = ("gcs/gcs_server", "raylet/raylet", "dashboard/dashboard.py", "monitor.py", "agent.py")

Fault = Callable[[], bool]
"""Make something fail, and repair it; false if there is nothing now that could fail."""


class Faults:
    """The faults that can hit a run, each of which is repaired by the method that makes it."""

    def __init__(self, cluster: Cluster, draw: random.Random) -> None:
        self.cluster, self.draw = cluster, draw
        self.on_since = dict.fromkeys(WORKERS, time.monotonic())
        self.started_by_hand = 0

    def of(self, run: Run) -> Mapping[str, Fault]:
        return {
            "worker process killed": partial(self.kill_worker, run),
            "worker killed for want of memory": partial(self.take_memory, run),
            "driver killed": partial(self.kill_driver, run),
            "worker host without power": self.power_off,
            "worker host drained, then without power": self.drain,
            "link cut": self.cut_link,
        }

    def kill_worker(self, run: Run) -> bool:
        if not (workers := list(run.workers_on().values())):
            return False
        self.draw.choice(workers).kill()
        return True

    def take_memory(self, run: Run) -> bool:
        if not (workers := list(run.workers_on().values())):
            return False
        victim = self.draw.choice(workers)
        with no_memory_left() as limit:
            limit.add(victim.pid)
            self.cluster.wait_for(lambda: limit.killed() > 0 or not victim.is_running(), "the kernel to kill it", 60)
        return True

    def kill_driver(self, run: Run) -> bool:
        drivers = run.drivers()
        for driver in drivers:
            driver.kill()
        return bool(drivers)

    def power_off(self) -> bool:
        if (host := self._host()) is None:
            return False
        self._off_and_on(host)
        return True

    def drain(self) -> bool:
        if (host := self._host()) is None:
            return False
        try:
            self.cluster.drain(host, NOTICE_S)
        except RuntimeError:  # the head has not noticed yet that the host is back
            return False
        time.sleep(NOTICE_S)
        self._off_and_on(host)
        return True

    def cut_link(self) -> bool:
        if (host := self._host()) is None:
            return False
        self.cluster.hosts.link(host, "down")
        time.sleep(CUT_S)
        self.cluster.hosts.link(host, "up")
        return True

    def look_after_hosts(self) -> None:
        """Starts Ray where it should long have been started."""
        for host, since in self.on_since.items():
            if self._has_ray(host):
                self.on_since[host] = time.monotonic()
            elif time.monotonic() - since > BACK_S:
                self.started_by_hand += 1
                self.cluster.restart_ray(host, {})

    def _host(self) -> int | None:
        """A worker host on which Ray runs."""
        hosts = [host for host in WORKERS if self._has_ray(host)]
        return self.draw.choice(hosts) if hosts else None

    def _has_ray(self, host: int) -> bool:
        return bool(self.cluster.processes(host, "raylet/raylet"))

    def _off_and_on(self, host: int) -> None:
        self.cluster.hosts.power_off(host)
        time.sleep(OFF_S)
        self.cluster.hosts.power_on(host)
        self.on_since[host] = time.monotonic()


class Record:
    """Everything that happened, in a file and on the screen."""

    def __init__(self, path: Path, cluster: Cluster) -> None:
        self.path, self.cluster, self.began = path, cluster, time.monotonic()
        self.rows = list[dict[str, object]]()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def add(self, **row: object) -> None:
        row = {"minute": round((time.monotonic() - self.began) / 60, 1), **row}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)

    def add_fault(self, fault: str, run: Run) -> None:
        """Add a fault, with the memory and files of the head's processes of Ray, and the size of the shared folder."""
        rss = files = 0
        for process in self.cluster.processes(HEAD):
            try:
                if any(name in " ".join(process.cmdline()) for name in OF_THE_HEAD):
                    rss, files = rss + process.memory_info().rss, files + process.num_fds()
            except psutil.NoSuchProcess:
                continue
        held = {"head_MiB": rss >> 20, "head_files": files, "shared_MiB": _size(self.cluster.shared) >> 20}
        self.add(fault=fault, job=run.JOB, **held)


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size
        except FileNotFoundError:
            continue
    return total


def ended(run: Run) -> tuple[int, str] | None:
    """Exit code and output of the submission; None if it is not over after a second."""
    try:
        return run.end(seconds=1)
    except subprocess.TimeoutExpired:
        return None


def disturb(run: Run, faults: Faults, record: Record, every_s: float, until: float) -> None:
    """Runs a job to its end while things fail. Raises AssertionError if it does not come to its end."""
    began, submissions, hit = time.monotonic(), 1, Counter[str]()
    next_at, next_fault = began + every_s, ""
    own = ["scale.max_failures=-1", "train.checkpoint_every_steps=5"] if isinstance(run, Training) else []
    run.submit(*own)
    while True:
        if end := ended(run):
            code, output = end
            if code == 0:
                break
            record.add(ended=run.folder.name, code=code, output=output.splitlines()[-3:])
            submissions += 1
            run.submit(*own)
        now = time.monotonic()
        assert now - began < LONGEST_RUN_S, f"{run.folder} has not ended after {LONGEST_RUN_S} s"
        faults.look_after_hosts()
        if next_at <= now < until:
            possible = faults.of(run)
            next_fault = next_fault or faults.draw.choice(sorted(possible))
            if possible[next_fault]():
                record.add_fault(next_fault, run)
                hit[next_fault] += 1
                next_at, next_fault = now + every_s, ""
    seconds = round(time.monotonic() - began)
    record.add(run=run.folder.name, seconds=seconds, submissions=submissions, faults=sum(hit.values()))


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m tests.cluster_lab.random_faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=60, help="time in which runs begin and things fail")
    parser.add_argument("--every", type=float, default=60, help="seconds from one fault to the next")
    parser.add_argument("--seed", type=int, default=1, help="seed that the faults and what they hit are drawn by")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "random_faults.jsonl", help="file of all events")
    chosen = parser.parse_args()
    if why := lacking():
        raise SystemExit(why)
    folder = Path(tempfile.mkdtemp(prefix="lab-"))
    cluster = Cluster(folder, [])
    try:
        cluster.up()
        undisturbed = [kind(cluster, f"undisturbed-{number}") for number, kind in enumerate(KINDS)]
        for run in undisturbed:
            run.submit()
            run.ends_well()
        record, faults = Record(chosen.out, cluster), Faults(cluster, random.Random(chosen.seed))
        until, number = time.monotonic() + 60 * chosen.minutes, 0
        while time.monotonic() < until:
            run = KINDS[number % len(KINDS)](cluster, f"disturbed-{number}")
            disturb(run, faults, record, chosen.every, until)
            run.is_as(undisturbed[number % len(KINDS)])
            run.delete()
            number += 1
        by_kind = Counter(str(row["fault"]) for row in record.rows if "fault" in row)
        print(f"{number} runs, all with the undisturbed result; Ray started by hand {faults.started_by_hand} times")
        print(*(f"{count:4} {kind}" for kind, count in sorted(by_kind.items())), sep="\n")
    finally:
        cluster.hosts.down()
        cluster.slow.unmount()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
