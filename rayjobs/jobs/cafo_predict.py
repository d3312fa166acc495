"""Label images with a classifier that cafo-tune or cafo has chosen, or that CaFo.save wrote: any number of them.

Each image gets its likeliest classes with calibrated probabilities, their margin, and a prediction set if a coverage is
set. The predictions are written to the run's folder `predictions` as Parquet or CSV, one file for some hundred images.
Images that cannot be read are listed in rejected.jsonl, each with its reason. The same command resumes an interrupted
run, and predicts images that were added since.
"""

import time
from dataclasses import dataclass
from typing import Any

from cafo.prediction import set_threshold
from cafo.prediction_sets import score_threshold
from rayjobs.cluster.ray_init import connect
from rayjobs.config import to_dict
from rayjobs.console import show_table
from rayjobs.data.image_collection import Collection
from rayjobs.data.image_dataset import log_notices
from rayjobs.data.rejected import write_rejected
from rayjobs.errors import DataError
from rayjobs.inference.prediction import Output, Predicting, predict_units
from rayjobs.inference.prediction_run import Work, all_rejected, forget_rejected, plan_work, record_states, summarize
from rayjobs.job_configs.cafo_predict import Config
from rayjobs.jobs import cafo_eval
from rayjobs.lifecycle import job
from rayjobs.models.encoder import VisionEncoderConfig
from rayjobs.runs.provenance import check_provenance, lock_provenance
from rayjobs.runs.record import write_result
from rayjobs.runs.run_dir import REJECTED_FILE, open_run
from rayjobs.storage.fingerprint import file_fingerprint
from rayjobs.storage.paths import resolve_path
from rayjobs.tune.classifier import OpenedClassifier, open_chosen, open_saved

SETTINGS = "prediction.json"
"""File of a run: all that its predictions depend on."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A classifier and images that fit each other."""

    opened: OpenedClassifier
    encoders: dict[str, VisionEncoderConfig]
    """those that the classifier reads"""
    found: Collection

    def notices(self) -> list[str]:
        """Return what a user should know about the probabilities."""
        if self.opened.calibration is None:
            return ["the classifier knows no held-out images: its probabilities are not calibrated"]
        return []


def check(settings: Config) -> Checked:
    """Check everything that can be checked before an encoder is loaded.

    Raises a UserError or a CafoError for the first problem.
    """
    path, encoders = resolve_path(settings.classifier), dict(settings.encoders)
    if path.is_file():
        opened = open_saved(path)
    else:
        evaluation = cafo_eval.check(cafo_eval.Config(sweep=settings.classifier))
        encoders = {**evaluation.swept.encoders, **encoders}
        opened = open_chosen(path, evaluation.chosen, method=settings.method, shots=settings.shots, seed=settings.seed)
    if settings.coverage is not None:
        set_threshold(opened.calibration, settings.coverage)
    used = opened.configs(encoders)
    check_provenance(settings.run.folder / SETTINGS, identity(settings, opened))
    return Checked(opened=opened, encoders=used, found=settings.data.find())


def output_of(settings: Config) -> Output:
    """Return folder, format and columns of the predictions."""
    return Output(folder=str(settings.run.folder), format=settings.format, top=settings.top, coverage=settings.coverage)


def identity(settings: Config, opened: OpenedClassifier) -> dict[str, Any]:
    """Return all that the predictions of a run depend on."""
    return {
        "classifier": file_fingerprint(opened.file),
        "encoders": {name: opened.classifier.encoders[name] for name in opened.sources},
        "data": to_dict(settings.data),
        "top": settings.top,
        "coverage": settings.coverage,
        "format": settings.format,
        "images_per_shard": settings.images_per_shard,
    }


def plan(settings: Config) -> None:
    """Show what `run` would do."""
    checked = check(settings)
    opened, work = checked.opened, plan_work(checked.found, output_of(settings), settings.images_per_shard)
    held_out = 0 if opened.calibration is None else len(opened.calibration.scores)
    calibrated = f"calibrated on {held_out:,} held-out images" if held_out else "not calibrated"
    rows = [
        ["classifier", f"{opened.name}: {len(opened.classifier.class_names)} classes {opened.estimate}".strip()],
        ["encoders", ", ".join(f"{name} ({e.kind} {e.name})" for name, e in checked.encoders.items())],
        ["probabilities", calibrated],
        ["data", checked.found.describe()],
        ["left", _describe_left(work)],
        ["out", f"{settings.run.folder / 'predictions'}: {settings.format}, the best {settings.top} classes"],
    ]
    if settings.coverage is not None and opened.calibration is not None:
        score = score_threshold(opened.calibration.scores, settings.coverage)
        rows.append(
            ["prediction sets", f"{settings.coverage:.0%} coverage: classes of probability {1 - score:.3g} or more"]
        )
    show_table("plan", ["", ""], rows)


def _describe_left(work: Work) -> str:
    if work.left is None:
        return f"{len(work.units):,} tasks; the images of tars are counted as they are read"
    return f"{work.left:,} of {work.images:,} images, in {len(work.units):,} tasks"


@job
def run(settings: Config) -> dict[str, Any]:
    """Predict the images that are left; return and write `result.json`, with `rejected.jsonl` beside it."""
    checked = check(settings)
    opened, output = checked.opened, output_of(settings)
    encoders = opened.open_encoders(checked.encoders)
    folder = open_run(settings.run, settings)
    lock_provenance(folder / SETTINGS, identity(settings, opened))
    if settings.retry_rejected:
        forget_rejected(output)
    work = plan_work(checked.found, output, settings.images_per_shard)
    record_states(output, work)
    done, seconds = 0, 0.0
    if work.units:
        connect(folder, settings.run.cache_folder)
        started = time.monotonic()
        how = Predicting(
            encoders=encoders,
            batch=settings.batch,
            per_shard=settings.images_per_shard,
            pool=settings.scale,
            output=output,
        )
        done = predict_units(work.units, opened.classifier, opened.calibration, how, work.left)
        seconds = time.monotonic() - started
    rejected = [*(image._asdict() for image in checked.found.rejected), *all_rejected(output)]
    write_rejected(folder, rejected)
    summary = summarize(output)
    if not summary["images"]:
        first = f": {rejected[0]['path']}: {rejected[0]['reason']}" if rejected else ""
        raise DataError(f"none of {len(rejected):,} images can be read{first}; all of them: {folder / REJECTED_FILE}")
    speed = f", {done / seconds:,.1f} images/s" if seconds else ""
    result = {
        "headline": f"{summary['images']:,} images predicted, {len(rejected):,} rejected{speed}",
        "classifier": opened.name,
        "rejected_images": len(rejected),
        "predicted_now": done,
        "seconds": round(seconds, 1),
        **summary,
        "out": str(folder / "predictions"),
        **log_notices(checked.notices()),
    }
    write_result(folder, result)
    shown = [[name.replace("_", " "), str(value)] for name, value in result.items() if not isinstance(value, list)]
    show_table(settings.run.name, ["", ""], shown)
    return result
