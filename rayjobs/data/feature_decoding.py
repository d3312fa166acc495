"""Decode and crop the images of a part of an image list.

Each image is decoded once for all encoders, and cropped once for those that crop it alike. Crops travel as bytes, a
quarter of their size in float32, and are normalised where they are encoded. The code runs in Ray Data tasks, so it does
not import torch, which takes seconds.

Legend: n images of a part, V views, S side of an encoder's images.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from cafo.errors import ImageError
from cafo.images import CLIP_MEAN, CLIP_STD, Preprocess, load_image
from rayjobs.storage.paths import resolve_path

REJECTED_IMAGES = pa.list_(pa.struct([("path", pa.string()), ("reason", pa.string())]))


@dataclass(frozen=True, kw_only=True)
class PartTask:
    """One part of an image list, and the files that are missing of it."""

    root: str
    """folder that the paths are relative to"""
    first: int
    """position of the first image in the list"""
    paths: list[str]
    views: int
    """V; 0 for the plain view"""
    seed: int
    min_area: float
    flips: bool
    outputs: dict[str, str]
    """encoder → path of its file of this part"""

    def to_row(self) -> dict[str, Any]:
        """Return the task as a row for Ray Data; `outputs` is a list, so that all rows have one Arrow type."""
        outputs = [{"encoder": encoder, "path": path} for encoder, path in self.outputs.items()]
        return {"task": {**asdict(self), "outputs": outputs}}

    @classmethod
    def from_row(cls, table: pa.Table) -> "PartTask":
        """Read the task from a table of one row."""
        task = table["task"][0].as_py()
        return cls(**{**task, "outputs": {output["encoder"]: output["path"] for output in task["outputs"]}})

    def crop_image(self, preprocess: Preprocess, image: Image.Image, path: str) -> list[np.ndarray]:
        """Return the views of an image, each (S, S, 3) uint8: V augmented ones, or the plain one if V is 0."""
        if not self.views:
            return [np.asarray(preprocess.crop(image))]
        views = (
            preprocess.crop_view(image, path, i, self.seed, min_area=self.min_area, flips=self.flips)
            for i in range(self.views)
        )
        return [np.asarray(view) for view in views]


def decode_part(table: pa.Table, preprocess: Mapping[str, Preprocess]) -> pa.Table:
    """Decode the images of a part and crop their views.

    Args:
        table: one row with a `PartTask`.
        preprocess: the preprocessing of each encoder.

    Returns:
        The row with `rows`, the positions of the images that could be read; `rejected`, the others; and a column
        `pixels<i>` of (n * V, S, S, 3) uint8 for each way in which the encoders that lack the part crop images.
    """
    task = PartTask.from_row(table)
    kinds = distinct_crops(preprocess, task)
    views: list[list[np.ndarray]] = [[] for _ in kinds]
    rows: list[int] = []
    rejected: list[dict[str, str]] = []
    root = resolve_path(task.root)
    for row, path in enumerate(task.paths, task.first):
        try:
            image = load_image(root / path, name=path)
        except ImageError as error:
            rejected.append({"path": path, "reason": str(error)})
            continue
        rows.append(row)
        for kind, kind_views in zip(kinds, views, strict=True):
            kind_views += task.crop_image(kind, image, path)
    pixels = [b"".join(view.tobytes() for view in kind_views) for kind_views in views]
    # All rows need the same columns, also where fewer encoders lack the part.
    pixels += [b""] * (len(preprocess) - len(pixels))
    columns = {f"pixels{i}": pa.array([values], pa.large_binary()) for i, values in enumerate(pixels)}
    return pa.table(
        {
            "task": table["task"],
            "rows": pa.array([rows], pa.list_(pa.int64())),
            "rejected": pa.array([rejected], REJECTED_IMAGES),
            **columns,
        }
    )


def distinct_crops(preprocess: Mapping[str, Preprocess], task: PartTask) -> list[Preprocess]:
    """Return the ways in which a task's encoders crop images, each once; its index is the number of its column."""
    return list(dict.fromkeys(crop_of(preprocess[name], task) for name in task.outputs))


def crop_of(preprocess: Preprocess, task: PartTask) -> Preprocess:
    """Return a preprocessing with standard values in place of those that the crops of a task do not depend on."""
    crop = replace(preprocess, mean=CLIP_MEAN, std=CLIP_STD)
    return replace(crop, resize=crop.size, mode="shortest") if task.views else crop
