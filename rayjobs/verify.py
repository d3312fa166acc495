"""Verify a finished run: its files by their digests, and its training by making a part of it again.

A training is repeated from one of its checkpoints to the next, by as many workers as made those steps, and compared to
the bit: the losses of the steps, the trained tensors and the optimizer's moments. That needs the same kind of machine;
another processor or number of threads may round differently.
"""

import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from adapter.adapter_formats import read_adapter
from rayjobs.cluster.ray_init import connect
from rayjobs.cluster.worker_pool import WorkerRange
from rayjobs.config import load
from rayjobs.errors import ConfigError, DataError, ProvenanceError
from rayjobs.job_configs.adapter_train import Config
from rayjobs.jobs.adapter_train import adapter_file, check_fit, open_inputs, prepare_inputs, train_job
from rayjobs.runs.file_digests import changed_files
from rayjobs.runs.record import RESULT_FILE, read_record
from rayjobs.runs.run_dir import CONFIG_FILE
from rayjobs.runs.trackers import TrackConfig
from rayjobs.storage.files import read_jsonl, read_object
from rayjobs.storage.hub_model import ADAPTER_FILE
from rayjobs.storage.paths import remove_folder
from rayjobs.storage.yaml_file import read_yaml
from rayjobs.train.checkpoint import DAMAGE, TrainingCheckpoint, list_checkpoints, read_checkpoint, write_checkpoint
from rayjobs.train.start_times import StartTimes
from rayjobs.train.train_job import TrainJob
from rayjobs.train.trainer import EXPERIMENT, fit

logger = logging.getLogger(__name__)


def verify(folder: Path, step: int | None = None) -> list[str]:
    """Check a finished run and return a line for each thing that differs from its record; log what is as it was.

    step: of an adapter's training, the step of the checkpoint from which it is made again up to the next one, 0 for its
    beginning; None for the last but one. Raises DataError for a folder without a finished run, ConfigError for a step
    without a checkpoint.
    """
    record = read_record(folder)
    if record is None or record.state != "done":
        state = "holds no run" if record is None else f"holds a run that is {record.now().state}"
        raise DataError(f"{folder} {state}: only a run that is done can be verified")
    if step is not None and record.job != Config.JOB:
        raise ConfigError(f"--step {step}: {folder} is a run of {record.job}, and only trainings are made again")
    count, differences = changed_files(folder)
    logger.info("%s of %d files are as the run left them", count - len(differences), count)
    if record.job == Config.JOB:
        differences += check_metrics(folder)
        differences += Training(folder).verify(step)
    return differences


def check_metrics(folder: Path) -> list[str]:
    """Return a line if the metrics do not hold each step of the result once."""
    steps = [row["step"] for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]
    last = read_object(folder / RESULT_FILE).get("steps")
    if not isinstance(last, int):
        return [f"{RESULT_FILE}: tells no number of steps"]
    if steps != list(range(1, last + 1)):
        return [f"metrics.jsonl: holds {len(steps)} steps up to {max(steps, default=0)}, not each of {last} once"]
    logger.info("metrics.jsonl holds each of %d steps once", last)
    return []


class Part(NamedTuple):
    """A part of a training, from one checkpoint to the next."""

    start: TrainingCheckpoint | None
    """None for the beginning."""
    end: TrainingCheckpoint

    @property
    def first_step(self) -> int:
        """The last step before the part, 0 at the beginning."""
        return self.start.step if self.start else 0


class Training:
    """A finished run of adapter-train, wherever its folder is now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        place = {"run.storage": str(folder.parent), "run.name": folder.name}
        self.settings: Config = load(Config, read_yaml(folder / CONFIG_FILE), place)
        self.rows = {row["step"]: row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row}

    def verify(self, step: int | None) -> list[str]:
        """Check the adapter against the last checkpoint, and make a part of the training again."""
        checkpoints, differences = self.read_checkpoints()
        if not checkpoints:
            return [*differences, f"{EXPERIMENT}: no checkpoint is left that can be read"]
        part = choose_part(checkpoints, step)
        workers = self.workers(part)
        inputs = open_inputs(self.settings)
        try:
            check_fit(self.settings, inputs)
        except ProvenanceError as error:
            return [*differences, str(error)]
        connect(self.folder, self.settings.run.cache_folder)
        store, images = prepare_inputs(self.settings, inputs)
        job = train_job(self.settings, inputs, store, images)
        made = adapter_file(self.settings, job, checkpoints[-1].state, inputs).tensors
        differences += compare(f"{ADAPTER_FILE}: ", made, read_adapter(self.folder / ADAPTER_FILE).tensors)
        return differences + self.repeat(replace(job, stop_after=part.end.step), part, workers)

    def read_checkpoints(self) -> tuple[list[TrainingCheckpoint], list[str]]:
        """Return the checkpoints that are whole, the oldest first, and a line for each that is not."""
        whole, damaged = [], []
        for place in list_checkpoints(f"{self.folder}/{EXPERIMENT}")[::-1]:
            try:
                whole.append(read_checkpoint(place))
            except DAMAGE as error:
                damaged.append(f"{EXPERIMENT}/{Path(place.path).name}: is damaged ({error})")
        return whole, damaged

    def workers(self, part: Part) -> int:
        """Return the number of workers that made the steps of a part. Raises DataError if it has changed meanwhile."""
        steps = range(part.first_step + 1, part.end.step + 1)
        counts = sorted({self.rows[step]["workers"] for step in steps if step in self.rows})
        if len(counts) != 1:
            raise DataError(
                f"steps {steps.start} to {part.end.step} were made by {' and by '.join(map(str, counts))} workers in "
                "turn, so that they cannot be repeated to the bit"
            )
        return counts[0]

    def repeat(self, job: TrainJob, part: Part, workers: int) -> list[str]:
        """Make a part of the training again, in a folder that is removed; return a line for each difference."""
        folder = self.settings.run.cache_folder / f"verify-{uuid.uuid4().hex[:8]}"
        scale = replace(self.settings.scale, workers=WorkerRange(min=workers, max=workers))
        folder.mkdir(parents=True)
        try:
            if part.start:
                write_checkpoint(f"{folder}/{EXPERIMENT}", part.start)
            state = fit(job, scale, folder, TrackConfig(), StartTimes())
            rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]
        finally:
            remove_folder(folder)
        what = f"steps {part.first_step + 1} to {part.end.step}, made again"
        differences = compare(f"{what}: ", part.end.state, state)
        for row in rows:
            before = self.rows.get(row["step"])
            if row["step"] > part.first_step and before and before["loss"] != row["loss"]:
                differences.insert(0, f"{what}: the loss of step {row['step']} was {before['loss']}, now {row['loss']}")
                break
        if not differences:
            logger.info("%s: %d tensors and all losses are equal to the bit", what, len(state))
        return differences


def choose_part(checkpoints: Sequence[TrainingCheckpoint], step: int | None) -> Part:
    """Return the part of a training that is made again.

    checkpoints: those that are left, the oldest first, at least one. step: as for `verify`. Raises ConfigError if no
    checkpoint of this step is left, or none after it.
    """
    by_step = {0: None, **{one.step: one for one in checkpoints}}
    steps = sorted(by_step)
    start = steps[-2] if step is None else step
    if start not in steps[:-1]:
        raise ConfigError(
            f"--step {step}: the training can be made again from step {' or '.join(map(str, steps[:-1]))}"
        )
    end = by_step[steps[steps.index(start) + 1]]
    assert end is not None, "0 is the first"
    return Part(by_step[start], end)


def compare(what: str, before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> list[str]:
    """Return a line, which begins with `what`, for each tensor that is not equal to the bit."""
    lines = [f"{what}{name} is in one of both only" for name in sorted(before.keys() ^ now.keys())]
    for name in sorted(before.keys() & now.keys()):
        old, new = before[name], now[name]
        if old.shape != new.shape:
            lines.append(f"{what}{name} was {tuple(old.shape)}, now {tuple(new.shape)}")
        elif not torch.equal(old.flatten().view(torch.uint8), new.flatten().view(torch.uint8)):
            apart, most = int((old != new).sum()), (old.double() - new.double()).abs().max()
            lines.append(f"{what}{name} differs in {apart} of {old.numel()} values, by at most {most:.3g}")
    return lines
