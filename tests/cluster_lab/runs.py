"""Runs on the cluster of this folder, watched from their folders, and compared with undisturbed ones."""

import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Self

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from adapter.adapter_formats import read_adapter
from cafo.cache import save_cache
from cafo.encoder_spec import EncoderSpec
from rayjobs.models.encoder import load_vision_encoder
from rayjobs.storage.files import read_jsonl
from tests.cluster_lab.cluster import HEAD, WORKERS, Cluster, Timing
from tests.rayjobs.cafo_dataset import dataset_overrides, make_dataset, make_images
from tests.rayjobs.jobs.test_cafo_predict import make_cache
from tests.sample_data import train_llama, write_instructions

STUCK_S = 300
"""Longest wait for a run to go on. What it really took is in the table at the end; it depends on the machine."""


class Mark(NamedTuple):
    """A moment of a run."""

    at: float
    checkpoint_step: int
    """The step of its newest checkpoint."""
    workers: set[int]


class Run:
    """One run of a job on the cluster, watched from its folder."""

    JOB, ACTOR = "", ""
    """Name of the job, and name of the actors that work for it."""

    def __init__(self, cluster: Cluster, folder: Path, settings: Iterable[str]) -> None:
        self.cluster, self.folder, self.settings = cluster, folder, list(settings)

    def submit(self, *more: str) -> None:
        """`more` are settings that override the run's own."""
        given = dict(setting.split("=", 1) for setting in [*self.settings, *more])
        self.process = self.cluster.submit(self.JOB, *(f"{name}={value}" for name, value in given.items()))

    def drivers(self) -> list[psutil.Process]:
        """The processes on the head that run the job."""
        return self.cluster.processes(HEAD, f"-m rayjobs {self.JOB}")

    def workers_on(self) -> dict[int, psutil.Process]:
        """{host: one of its actors that work}"""
        found = {host: self.cluster.processes(host, self.ACTOR) for host in (HEAD, *WORKERS)}
        return {host: processes[0] for host, processes in found.items() if processes}

    def end(self, seconds: float = 600) -> tuple[int, str]:
        """Exit code and output of the submission."""
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output

    def ends_well(self) -> str:
        code, output = self.end()
        assert code == 0, output[-4000:]
        return output

    def is_as(self, undisturbed: Self) -> None:
        """Compares the results of both runs."""
        raise NotImplementedError

    def delete(self) -> None:
        """Deletes what the run has written."""
        shutil.rmtree(self.folder)


class Training(Run):
    """A run of adapter-train."""

    JOB, ACTOR = "adapter-train", "RayTrainWorker"
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
        storage = storage or cluster.shared / "runs"
        base, records = cluster.shared / "llama", cluster.shared / "records.json"
        if not base.exists():
            train_llama(base)
            write_instructions(records, 120)  # 30 steps are an epoch
        named = [
            f"base.path={base}",
            f"data.path=[{records}]",
            f"run.storage={storage}",
            f"run.cache={cluster.shared / 'cache'}",
            f"run.name={name}",
        ]
        super().__init__(cluster, storage / name, [*named, *self.SETTINGS])

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

    def keeps_on(self, since: "Mark", what: str, steps: int = 40) -> None:
        """Waits until so many more steps are made, and notes the longest time that none was reported."""
        first, longest, reported = self.step(), 0.0, time.monotonic()
        last = first
        while last < first + steps:
            time.sleep(0.1)
            if (now := self.step()) != last:
                last, reported = now, time.monotonic()
            longest = max(longest, time.monotonic() - reported)
            assert time.monotonic() - reported < STUCK_S, f"{what}: no step in {STUCK_S} s"
            assert self.process.poll() is None, self.process.communicate()[0][-4000:]
        restarted = since.workers != {one.pid for one in self.workers_on().values()}
        lost = "workers started again" if restarted else "no step lost"
        self.cluster.timings.append(Timing(f"{what}: longest pause between steps", longest, lost))

    def weights(self) -> torch.Tensor:
        file = read_adapter(self.folder / "adapter.safetensors")
        return torch.cat([file.prompt.flatten(), file.gate.flatten()])

    def steps(self) -> list[int]:
        return [row["step"] for row in read_jsonl(self.folder / "metrics.jsonl")]

    def is_as(self, undisturbed: Self) -> None:
        assert self.steps() == undisturbed.steps(), "each step once in the metrics"
        torch.testing.assert_close(self.weights(), undisturbed.weights(), rtol=0, atol=1e-5)


class CafoRun(Run):
    """A run of a job of CaFo, with a feature store of its own."""

    SETTINGS: tuple[str, ...] = ()

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.home = cluster.shared / "cafo"
        if not self.home.exists():
            make_dataset(self.home, {"train": 20, "val": 20, "test": 5})
        self.cache = self.home / f"cache-{name}"
        named = [f"run.name={name}", f"run.cache={self.cache}"]
        super().__init__(cluster, self.home / "runs" / name, [*self.data(), *self.SETTINGS, *named])

    def data(self) -> list[str]:
        """The settings that name what the job reads."""
        return dataset_overrides(self.home)

    def parts(self) -> list[Path]:
        """The files that hold a part of the work each, as far as they are written."""
        raise NotImplementedError

    def rows(self) -> object:
        """The result of the run, without the time that it took."""
        raise NotImplementedError

    def wait_for_parts(self, count: int, what: str) -> None:
        """Waits until so many parts are written."""
        deadline = time.monotonic() + STUCK_S
        while len(self.parts()) < count:
            assert self.process.poll() is None, self.process.communicate()[0][-4000:]
            assert time.monotonic() < deadline, f"{what}: {len(self.parts())} parts after {STUCK_S} s"
            time.sleep(0.05)

    def is_as(self, undisturbed: Self) -> None:
        assert self.rows() == undisturbed.rows()

    def delete(self) -> None:
        super().delete()
        shutil.rmtree(self.cache)


class Sweep(CafoRun):
    """A run of cafo-tune."""

    JOB, ACTOR = "cafo-tune", "ImplicitFunc"
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

    def parts(self) -> list[Path]:
        return list(self.folder.glob("trials/*/result.json"))

    def rows(self) -> list[dict[str, object]]:
        """Every trial's row, but for the time that it took."""
        return [row | {"seconds": 0} for row in pq.read_table(self.folder / "results.parquet").to_pylist()]


class Encoding(CafoRun):
    """A run of cafo-features."""

    JOB, ACTOR = "cafo-features", "PartEncoder"
    SETTINGS = ("features.views=100", "shots=16", "features.batch=8", "scale.workers=3", "scale.cpus_per_worker=1")

    def parts(self) -> list[Path]:
        return list(self.cache.glob("features/*/*.parquet"))

    def rows(self) -> dict[str, pa.Table]:
        """{file of the store: its content}"""
        return {str(path.relative_to(self.cache)): pq.read_table(path) for path in sorted(self.parts())}


class Labelling(CafoRun):
    """A run of cafo-predict on 3,000 images."""

    JOB, ACTOR = "cafo-predict", "MapBatches(Predictor)"
    SETTINGS = ("images_per_shard=50", "batch=1", "scale.workers=3", "scale.cpus_per_worker=1")

    def data(self) -> list[str]:
        """A classifier of few images and random weights, which gives the images several classes."""
        images, model = self.home / "unlabelled", self.home / "model.safetensors"
        named = dataset_overrides(self.home)
        if not model.exists():
            make_images(images, {"test": 750}, seed=2)
            specs = json.loads((self.home / "encoders.json").read_text())
            save_cache(make_cache({n: load_vision_encoder(EncoderSpec(**spec)) for n, spec in specs.items()}), model)
        encoders = [setting for setting in named if setting.startswith(("encoders.", "run."))]
        return [*encoders, f"classifier={model}", f"data.path={images}"]

    def parts(self) -> list[Path]:
        return list(self.folder.glob("predictions/*.parquet"))

    def rows(self) -> list[dict[str, object]]:
        """The predictions, by image."""
        rows = [row for path in self.parts() for row in pq.read_table(path).to_pylist()]
        return sorted(rows, key=lambda row: str(row["path"]))
