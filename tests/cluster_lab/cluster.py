"""The shipped on-premises cluster, brought up on hosts of this machine, and jobs submitted to it as a user does."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
import yaml

from tests.cluster_lab.hosts import Hosts
from tests.cluster_lab.slow_disk import SlowDisk
from tests.conftest import ROOT

USER, HEAD, WORKERS = 0, 1, (2, 3)
ONPREM = ROOT / "configs" / "cluster" / "onprem.yaml"
CALM = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_COLOR_MODE": "none"}


class Timing(NamedTuple):
    """A line of the table that a session ends with."""

    what: str
    seconds: float
    note: str = ""


class Cluster:
    """Four hosts: the user's, a head, two workers. `shared` is their common storage."""

    def __init__(self, folder: Path, timings: list[Timing]) -> None:
        self.shared, self.small, self.timings = folder / "shared", folder / "small", timings
        self.shared.mkdir()
        self.small.mkdir()
        self.slow = SlowDisk(folder / "slow", megabytes=16)
        self.hosts = Hosts(folder, 4, disks={self.small: "1m"})
        self.submissions: list[subprocess.Popen[str]] = []
        self.tunnel: subprocess.Popen[str] | None = None
        self.file = folder / "onprem.yaml"
        settings = yaml.safe_load(ONPREM.read_text())
        settings["provider"]["head_ip"] = self.hosts.address(HEAD)
        settings["provider"]["worker_ips"] = [self.hosts.address(host) for host in WORKERS]
        settings["auth"]["ssh_user"] = "root"
        settings["file_mounts"]["~/rayjobs"] = str(self.hosts.project)
        settings["setup_commands"][0] = f"ln -sfn {sys.prefix} ~/rayjobs/.venv"  # instead of gigabytes on each host
        self.file.write_text(yaml.safe_dump(settings, sort_keys=False))

    def user(self, *command: str, timeout: float = 300) -> str:
        """What a user types in the project's folder. Raises RuntimeError if it fails."""
        known = [f"{name}={value}" for name, value in CALM.items()]
        return self.hosts.run(USER, "env", *known, *command, timeout=timeout)

    def up(self) -> None:
        """Brings the cluster up; also once more, after its head was lost."""
        if self.tunnel is None:
            self.user("ray", "get-auth-token", "--generate")
        else:
            self.tunnel.kill()
            self.tunnel.wait()
        with self.timed("ray up, until the head is there"):
            self.user("env", "RAY_UP_enable_autoscaler_v2=0", "ray", "up", "-y", str(self.file))
        with self.timed("from there until both workers are there"):
            self.wait_for(lambda: self.alive() == 3, "three nodes", 240)
        self.tunnel = self.hosts.popen(USER, ["ray", "dashboard", str(self.file)], stdout=subprocess.DEVNULL)
        self.wait_for(self.answers, "the dashboard", 180)

    def down(self) -> None:
        with self.timed("ray down, until the head is free"):
            self.user("ray", "down", "-y", str(self.file))
            self.wait_for(lambda: not self.of_ray(HEAD), "the end of Ray on the head", 30)
        with self.timed("from there until the workers are free"):
            self.wait_for(lambda: not any(map(self.of_ray, WORKERS)), "the end of Ray on the workers", 180)

    def alive(self) -> int:
        """Nodes that the head counts as alive."""
        code = "import ray; ray.init(log_to_driver=False); print('alive', sum(n['Alive'] for n in ray.nodes()))"
        env = ["env", "RAY_AUTH_MODE=token", f"RAY_ADDRESS={self.hosts.address(HEAD)}:6379"]
        return int(self.hosts.run(HEAD, *env, sys.executable, "-c", code).rpartition("alive ")[2].split()[0])

    def answers(self) -> bool:
        try:
            self.on_dashboard("ray", "job", "list")
        except RuntimeError:
            return False
        return True

    def on_dashboard(self, *command: str) -> str:
        return self.user("env", "RAY_AUTH_MODE=token", "RAY_ADDRESS=http://127.0.0.1:8265", *command)

    def running(self) -> str:
        """The submission id of the one job that runs."""
        code = (
            "from ray.job_submission import JobSubmissionClient as Client\n"
            "print(*(job.submission_id for job in Client().list_jobs() if job.status == 'RUNNING'))"
        )
        return self.on_dashboard("python", "-c", code).split()[-1]

    def restart_ray(self, host: int, environment: Mapping[str, str]) -> None:
        """Starts Ray on a worker host again, with these variables in its environment and in that of its workers."""
        self.hosts.run(host, "ray", "stop", "--force")
        known = {"RAY_AUTH_MODE": "token", **CALM, **environment}
        join = ["ray", "start", f"--address={self.hosts.address(HEAD)}:6379"]
        self.hosts.run(host, "env", *(f"{name}={value}" for name, value in known.items()), *join)
        self.wait_for(lambda: self.alive() == 3, "three nodes", 240)

    def drain(self, host: int, notice_s: int) -> None:
        """Announce, on a host, that it will be taken away, as its owner does who reads a cloud's notice there."""
        why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command = ["ray", "drain-node", *why, "--deadline-remaining-seconds", str(notice_s)]
        self.hosts.run(host, "env", "RAY_AUTH_MODE=token", *command)

    def of_ray(self, host: int) -> list[psutil.Process]:
        return [one for one in self.processes(host) if "ray" in " ".join(one.cmdline()[:2])]

    def processes(self, host: int, having: str = "") -> list[psutil.Process]:
        found = []
        for pid in self.hosts.pids(host):
            try:
                process = psutil.Process(pid)
                if having in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def submit(self, job: str, *settings: str) -> "subprocess.Popen[str]":
        known = [f"{name}={value}" for name, value in CALM.items()]
        command = ["env", *known, "python", "-m", "rayjobs", job, *settings, "--submit"]
        self.submissions.append(self.hosts.popen(USER, command))
        return self.submissions[-1]

    def recover(self) -> None:
        """Stop what a failed test left running, and switch on what it left off, so that the next test can run."""
        off = [host for host in (HEAD, *WORKERS) if host not in self.hosts.processes]
        for host in off:
            self.hosts.power_on(host)
        if HEAD in off:
            self.up()
        for submission in self.submissions:
            if submission.poll() is None:
                if HEAD in off:  # its job is gone with the head
                    submission.kill()
                else:
                    self.on_dashboard("ray", "job", "stop", self.running())
                submission.communicate(timeout=60)
        self.submissions.clear()
        for host in WORKERS:
            if not self.processes(host, "raylet/raylet"):  # just switched on, or `ray start` took too long there
                self.restart_ray(host, {})

    def timed(self, what: str) -> "Clock":
        return Clock(what, self.timings)

    @staticmethod
    def wait_for(met: Callable[[], bool], what: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not met():
            assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
            time.sleep(0.5)


class Clock:
    """Times a block."""

    def __init__(self, what: str, timings: list[Timing]) -> None:
        self.what, self.timings = what, timings

    def __enter__(self) -> "Clock":
        self.began = time.monotonic()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.seconds = time.monotonic() - self.began
        if kind is None:
            self.timings.append(Timing(self.what, self.seconds))
