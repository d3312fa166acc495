"""Encode the images of a data set with every encoder, and keep the features in the cache folder for later runs.

cafo-tune and cafo-eval encode what they need themselves; this job does it beforehand, for example on other machines.
"""

from pathlib import Path
from typing import Any

from cafo.datasets import Dataset
from rayjobs.cluster.ray_init import connect
from rayjobs.console import show_result, show_table
from rayjobs.data.feature_store import FeatureStore, open_encoders
from rayjobs.data.few_shot_images import FewShotPlan, encode_few_shot
from rayjobs.data.image_dataset import log_notices
from rayjobs.data.image_list import ImageList, plain_list, training_list
from rayjobs.data.rejected import write_rejected
from rayjobs.job_configs.cafo_features import Config
from rayjobs.lifecycle import job
from rayjobs.runs.record import write_result
from rayjobs.runs.run_dir import open_run


def check(settings: Config) -> tuple[Dataset, list[ImageList]]:
    """Check everything that can be checked before a worker starts; return the data set and the images to encode.

    Raises a UserError for the first problem.
    """
    dataset = settings.data.open()
    choices = few_shot_plan(settings, dataset).choose()
    root, generated = settings.data.generated_images(dataset, settings.generated)
    views = settings.features.views
    lists = [
        training_list(dataset, choices.values(), views),
        ImageList(role="generated", root=root, items=generated, views=views),
        plain_list("val", dataset.image_root, dataset.val),
    ]
    if settings.test:
        lists.append(plain_list("test", dataset.image_root, dataset.open_test()))
    return dataset, [images for images in lists if images.items]


def few_shot_plan(settings: Config, dataset: Dataset) -> FewShotPlan:
    """The few-shot choices whose images are encoded."""
    shots, short = [settings.shots], settings.data.short_classes
    return FewShotPlan(dataset=dataset, shots=shots, seeds=settings.seeds, short=short)


def plan(settings: Config) -> None:
    """Show what `run` would do."""
    dataset, lists = check(settings)
    rows = [["data set", f"{dataset.name}, {len(dataset.class_names)} classes"]]
    rows += [[images.role, f"{len(images.items)} images × {max(images.views, 1)} views"] for images in lists]
    rows += [[f"encoder {name}", f"{e.kind} {e.name} {e.weights}"] for name, e in settings.encoders.items()]
    show_table("plan", ["", ""], rows)


@job
def run(settings: Config) -> dict[str, Any]:
    """Encode what the feature store lacks; return and write `result.json`, with `rejected.jsonl` beside it."""
    dataset, lists = check(settings)
    encoders = open_encoders(settings.encoders)  # one that cannot be loaded is told before Ray starts
    folder: Path = open_run(settings.run, settings)
    connect(folder, settings.run.cache_folder)
    resources = settings.scale.resources()
    store = FeatureStore(
        encoders=encoders,
        settings=settings.features,
        cache=settings.run.cache_folder,
        workers=settings.scale.workers.max,
        resources=resources,
    )
    others = [images for images in lists if not images.training]
    choices, views = few_shot_plan(settings, dataset), settings.features.views
    images = encode_few_shot(store, choices, views, others, plain=settings.plain)
    rejected = [image for features in images.features.values() for image in features.rejected]
    write_rejected(folder, (image._asdict() for image in rejected))
    counts: dict[str, int] = {}
    for role, features in images.features.items():
        kind = "train" if images.lists[role].training else role
        counts[f"{kind}_images"] = counts.get(f"{kind}_images", 0) + len(features.rows)
    headline = f"{sum(counts.values())} images through {', '.join(settings.encoders)}"
    result: dict[str, Any] = {"headline": headline, "data_set": dataset.name, **counts}
    result |= {"rejected_images": len(rejected), **log_notices(dataset.notices)}
    write_result(folder, result)
    show_result(settings.run.name, result)
    return result
