"""The shipped on-premises cluster, brought up on hosts of this machine, and jobs submitted to it as a user does."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import pyarrow.parquet as pq
import torch
import yaml

from adapter.adapter_formats import read_adapter
from rayjobs.storage.files import read_jsonl
from tests.cluster_lab.hosts import Hosts
from tests.conftest import ROOT
from tests.rayjobs.cafo_dataset import dataset_overrides, make_dataset
from tests.sample_data import train_llama, write_instructions

USER, HEAD, WORKERS = 0, 1, (2, 3)
STUCK_S = 300
"""Longest wait for a run to go on. What it really took is in the table at the end; it depends on the machine."""
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
        self.hosts = Hosts(folder, 4, disks={self.small: "1m"})
        self.submissions: list[subprocess.Popen[str]] = []
        self.file = folder / "onprem.yaml"
        settings = yaml.safe_load(ONPREM.read_text())
        settings["provider"]["head_ip"] = self.hosts.address(HEAD)
        settings["provider"]["worker_ips"] = [self.hosts.address(host) for host in WORKERS]
        settings["auth"]["ssh_user"] = "root"
        settings["setup_commands"][0] = f"ln -sfn {sys.prefix} ~/rayjobs/.venv"  # instead of gigabytes on each host
        self.file.write_text(yaml.safe_dump(settings, sort_keys=False))

    def user(self, *command: str, timeout: float = 300) -> str:
        """What a user types in the project's folder. Raises RuntimeError if it fails."""
        known = [f"{name}={value}" for name, value in CALM.items()]
        return self.hosts.run(USER, "env", *known, *command, timeout=timeout)

    def up(self) -> None:
        self.user("ray", "get-auth-token", "--generate")
        with self.timed("ray up, until the head is there"):
            self.user("env", "RAY_UP_enable_autoscaler_v2=0", "ray", "up", "-y", str(self.file))
        with self.timed("from there until both workers are there"):
            self.wait_for(lambda: self.alive() == 3, "three nodes", 180)
        self.tunnel = self.hosts.popen(USER, ["ray", "dashboard", str(self.file)], stdout=subprocess.DEVNULL)
        self.wait_for(self.answers, "the dashboard", 60)

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
        for submission in self.submissions:
            if submission.poll() is None:
                self.on_dashboard("ray", "job", "stop", self.running())
                submission.communicate(timeout=60)
        self.submissions.clear()
        off = [host for host in WORKERS if host not in self.hosts.processes]
        for host in off:
            self.hosts.power_on(host)
        if off:
            self.wait_for(lambda: self.alive() == 3, "the nodes", 240)

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


class Mark(NamedTuple):
    """A moment of a run."""

    at: float
    checkpoint_step: int
    """The step of its newest checkpoint."""
    workers: set[int]


class Training:
    """One run of adapter-train on the cluster, watched from its folder."""

    SETTINGS = (
        "data.val_fraction=0",
        "data.max_length=256",
        "adapter.n_layers=2",
        "train.global_batch=4",
        "train.token_budget=1024",
        "train.epochs=5",
        "train.warmup_epochs=1",
        "train.checkpoint_every_s=null",
        "train.checkpoint_every_steps=25",
        "zero.stage=3",
        "scale.workers=2",
        "scale.cpus_per_worker=1.5",  # of a host's two: the workers are on two hosts
    )

    def __init__(self, cluster: Cluster, name: str, storage: Path | None = None) -> None:
        self.cluster, self.storage = cluster, storage or cluster.shared / "runs"
        base, records = cluster.shared / "llama", cluster.shared / "records.json"
        if not base.exists():
            train_llama(base)
            write_instructions(records, 120)  # 30 steps are an epoch
        self.folder = self.storage / name
        self.settings = [
            f"base.path={base}",
            f"data.path=[{records}]",
            f"run.storage={self.storage}",
            f"run.cache={cluster.shared / 'cache'}",
            f"run.name={name}",
            *self.SETTINGS,
        ]

    def submit(self, *more: str) -> None:
        """`more` are settings that override these."""
        given = dict(setting.split("=", 1) for setting in [*self.settings, *more])
        self.process = self.cluster.submit("adapter-train", *(f"{name}={value}" for name, value in given.items()))

    def step(self) -> int:
        """The last step in the metrics."""
        metrics = self.folder / "metrics.jsonl"
        rows = read_jsonl(metrics, last_bytes=1 << 12) if metrics.exists() else []
        return rows[-1]["step"] if rows else 0

    def checkpoints(self) -> list[tuple[int, Path]]:
        """The steps of the checkpoints that are there, and their folders, the oldest first."""
        found = []
        for path in self.folder.glob("train/checkpoint_*/position.json"):
            try:
                found.append((json.loads(path.read_text())["step"], path.parent))
            except (ValueError, OSError):  # being written, or being deleted
                continue
        return sorted(found)

    def wait_for_workers(self, workers: int, what: str, since: float, seconds: float = STUCK_S) -> None:
        """Waits until steps are made by so many workers, and notes the time since then."""
        while (rows := read_jsonl(self.folder / "metrics.jsonl", last_bytes=1 << 12))[-1]["workers"] != workers:
            assert self.process.poll() is None, self.process.communicate()[0][-4000:]
            assert time.monotonic() - since < seconds, f"{rows[-1]} after {seconds:.0f} s"
            time.sleep(0.1)
        self.cluster.timings.append(Timing(what, time.monotonic() - since))

    def wait_for_step(self, step: int, seconds: float = STUCK_S) -> None:
        deadline = time.monotonic() + seconds
        while self.step() < step:
            assert self.process.poll() is None, self.process.communicate()[0][-4000:]
            assert time.monotonic() < deadline, f"step {self.step()} after {seconds:.0f} s"
            time.sleep(0.1)

    def mark(self) -> "Mark":
        """Where the run is, before something happens to it."""
        newest = max((step for step, _ in self.checkpoints()), default=0)
        return Mark(time.monotonic(), newest, {one.pid for one in self.workers_on().values()})

    def goes_on(self, since: "Mark", what: str, seconds: float = STUCK_S) -> None:
        """Waits until steps are reported again, and notes the time from the mark until then, and the steps redone."""
        metrics, last = self.folder / "metrics.jsonl", self.step()
        touched, paused = metrics.stat().st_mtime_ns, 0.0
        while paused < 5:  # not one of the reports that were on their way
            time.sleep(0.1)
            now = metrics.stat().st_mtime_ns
            paused = time.monotonic() - since.at if now != touched else 0.0
            last, touched = max(last, self.step() if paused < 5 else 0), now
            assert time.monotonic() - since.at < seconds, f"{what}: no step in {seconds:.0f} s"
            assert self.process.poll() is None, self.process.communicate()[0][-4000:]
        restarted = since.workers != {one.pid for one in self.workers_on().values()}
        lost = f"{last - since.checkpoint_step} steps again" if restarted else "no step lost"
        self.cluster.timings.append(Timing(what, paused, lost))

    def workers_on(self) -> dict[int, psutil.Process]:
        """{host: its Train worker}"""
        hosts = (HEAD, *WORKERS)
        found = {host: self.cluster.processes(host, "RayTrainWorker") for host in hosts}
        return {host: processes[0] for host, processes in found.items() if processes}

    def end(self, seconds: float = 600) -> tuple[int, str]:
        """Exit code and output of the submission."""
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output

    def ends_well(self) -> str:
        code, output = self.end()
        assert code == 0, output[-4000:]
        return output

    def weights(self) -> torch.Tensor:
        file = read_adapter(self.folder / "adapter.safetensors")
        return torch.cat([file.prompt.flatten(), file.gate.flatten()])

    def steps(self) -> list[int]:
        return [row["step"] for row in read_jsonl(self.folder / "metrics.jsonl")]

    def is_as(self, undisturbed: "Training") -> None:
        assert self.steps() == undisturbed.steps(), "each step once in the metrics"
        torch.testing.assert_close(self.weights(), undisturbed.weights(), rtol=0, atol=1e-5)


class Sweep:
    """One run of cafo-tune on the cluster, with a feature store of its own."""

    SETTINGS = (
        "features.views=20",
        "space.shots=[1,4]",
        "space.seeds=[1,2,3]",
        "space.epochs=[8000]",  # some 10 s a trial
        "search.beta_steps=20",
        "scale.workers=2",
        "trials.workers=3",
        "trials.cpus_per_worker=1.5",
    )

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, home = cluster, cluster.shared / "cafo"
        if not home.exists():
            make_dataset(home, {"train": 20, "val": 20, "test": 5})
        self.folder, self.cache = home / "runs" / name, home / f"cache-{name}"
        self.settings = [*dataset_overrides(home), *self.SETTINGS, f"run.name={name}", f"run.cache={self.cache}"]

    def submit(self) -> None:
        self.process = self.cluster.submit("cafo-tune", *self.settings)

    def ends_well(self) -> None:
        output, _ = self.process.communicate(timeout=600)
        assert self.process.returncode == 0, output[-4000:]

    def rows(self) -> list[dict[str, object]]:
        """Every trial's row, but for the time that it took."""
        return [row | {"seconds": 0} for row in pq.read_table(self.folder / "results.parquet").to_pylist()]
