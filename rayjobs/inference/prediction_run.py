"""The run folder of cafo-predict: what is written already, what is left, and a summary of the predictions.

Images in files of their own count as done by their source and path; the rows of a Parquet file and the images of a tar
by their place in the file, which must not change.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from rayjobs.data.image_collection import Collection, ImageFile
from rayjobs.data.image_reading import Unit
from rayjobs.errors import ProvenanceError
from rayjobs.inference.prediction import COUNTS, PREDICTIONS, REJECTED, Output, read_shard
from rayjobs.storage.credentials import mask_url
from rayjobs.storage.files import read_jsonl, read_object, write_json
from rayjobs.storage.paths import resolve_path

SOURCES = "sources.json"
"""File of a run: the Parquet files and tars that were read, each with a digest of its size, beginning and end."""
_END_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work that is left to do."""

    units: list[Unit]
    images: int | None
    """all images; None if a tar was not read yet"""
    left: int | None
    """images that are not predicted yet"""
    states: dict[str, str] = field(default_factory=dict)
    """Parquet file or tar → its digest"""


def plan_work(found: Collection, output: Output, per_shard: int) -> Work:
    """Return the units that are left of what was found.

    Args:
        found: the images.
        output: where the predictions are.
        per_shard: images of a shard.

    Raises:
        ProvenanceError: a Parquet file or tar is another than when its predictions began.
    """
    folder = resolve_path(output.folder)
    states = {file: _digest(file) for file in dict.fromkeys(container.file for container in found.containers)}
    _check_states(folder, states)
    shards = [path.name.partition(".")[0] for path in _shards(folder)]
    done = _done_images(folder, output, [name for name in shards if name.startswith("images-")])
    images = [image for image in found.images if _key(image) not in done]
    units = [Unit(images=tuple(images[at : at + per_shard])) for at in range(0, len(images), per_shard)]
    total: int | None = len(found.images)
    left: int | None = len(images)
    written: dict[str, set[int]] = {}
    for name in shards:
        if not name.startswith("images-"):
            unit_name, _, number = name.rpartition("-")
            written.setdefault(unit_name, set()).add(int(number))
    for container in found.containers:
        unit = Unit(container=container, state=states[container.file])
        numbers = written.get(unit.name, set())
        counted = folder / COUNTS / f"{unit.name}.json"
        count = container.images
        if count is None and counted.exists():
            count = read_object(counted)["images"]
        total = None if count is None or total is None else total + count
        sizes = None if count is None else [min(per_shard, count - at) for at in range(0, count, per_shard)]
        if sizes is not None and numbers.issuperset(range(len(sizes))):
            continue
        units.append(replace(unit, done=tuple(sorted(numbers))))
        here = None if sizes is None else sum(size for i, size in enumerate(sizes) if i not in numbers)
        left = None if here is None or left is None else left + here
    return Work(units=units, images=total, left=left, states=states)


def record_states(output: Output, work: Work) -> None:
    """Record the digests of the files that are about to be read."""
    path = resolve_path(output.folder) / SOURCES
    before = read_object(path) if path.exists() else {}
    write_json(path, {**before, **{mask_url(file): state for file, state in work.states.items()}})


def forget_rejected(output: Output) -> None:
    """Remove the lists of rejected images in files of their own, which are then left to do again."""
    for path in _files(resolve_path(output.folder) / REJECTED, "images-*.jsonl"):
        path.unlink()


def all_rejected(output: Output) -> list[dict[str, Any]]:
    """Return the rejected images of all shards that are written."""
    folder = resolve_path(output.folder)
    shards = {path.name.partition(".")[0] for path in _shards(folder)}
    return [row for path in _files(folder / REJECTED, "*.jsonl") if path.stem in shards for row in read_jsonl(path)]


def summarize(output: Output) -> dict[str, Any]:
    """Return the number of predictions, and for each class its number and mean probability; from all shards.

    The most frequent classes come first, and equally frequent ones by name, in whatever order the shards were written.
    """
    images, sums, set_sizes = Counter[str](), defaultdict[str, float](float), 0
    for path in _shards(resolve_path(output.folder)):
        columns = ["class_1", "probability_1"] + ["prediction_set"] * (output.coverage is not None)
        table = read_shard(path, columns)
        grouped = table.group_by("class_1").aggregate([("probability_1", "sum"), ("probability_1", "count")])
        for row in grouped.to_pylist():
            images[row["class_1"]] += row["probability_1_count"]
            sums[row["class_1"]] += row["probability_1_sum"]
        if output.coverage is not None and table.num_rows:
            sets = table["prediction_set"]
            sizes = (
                pc.add(pc.count_substring(sets, '", "'), 1) if output.format == "csv" else pc.list_value_length(sets)
            )
            set_sizes += pc.sum(sizes).as_py()
    total = images.total()
    result: dict[str, Any] = {
        "images": total,
        "predicted_classes": [
            {"class": name, "images": count, "mean_probability": round(sums[name] / count, 4)}
            for name, count in sorted(images.items(), key=lambda item: (-item[1], item[0]))
        ],
    }
    if output.coverage is not None:
        result["mean_set_size"] = round(set_sizes / max(total, 1), 3)
    return result


def _shards(folder: Path) -> list[Path]:
    return [*_files(folder / PREDICTIONS, "*.parquet"), *_files(folder / PREDICTIONS, "*.csv")]


def _files(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern)) if folder.is_dir() else []


def _key(image: ImageFile) -> tuple[str, str]:
    return mask_url(image.source), mask_url(image.path)


def _done_images(folder: Path, output: Output, shards: Sequence[str]) -> set[tuple[str, str]]:
    return set(_names_of(folder, output, shards))


def _names_of(folder: Path, output: Output, shards: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield source and path of the images of shards, rejected ones too."""
    rejected = {path.stem: path for path in _files(folder / REJECTED, "*.jsonl")}
    for name in shards:
        table = read_shard(output.shard(name), ["source", "path"])
        yield from zip(table["source"].to_pylist(), table["path"].to_pylist(), strict=True)
        if name in rejected:
            yield from ((row["source"], row["path"]) for row in read_jsonl(rejected[name]))


def _digest(file: str) -> str:
    """Return a digest of a file's size, beginning and end."""
    with resolve_path(file).open("rb") as stream:
        digest = hashlib.sha256(stream.read(_END_BYTES))
        size = stream.seek(0, 2)
        stream.seek(max(0, size - _END_BYTES))
        digest.update(stream.read())
    digest.update(str(size).encode())
    return digest.hexdigest()[:16]


def _check_states(folder: Path, states: dict[str, str]) -> None:
    path = folder / SOURCES
    before = read_object(path) if path.exists() else {}
    if changed := [file for file, state in states.items() if before.get(mask_url(file), state) != state]:
        raise ProvenanceError(
            f"{', '.join(changed)}: the file is another than when its predictions began; put it back, or choose "
            "another run.name"
        )
