"""Images → a feature store: decoded once by Ray Data, all views by all encoders, shared by every run and trial.

A store is a folder per (list of images, encoder), named after everything its features depend on: each file's path and
content, the encoder's identity (weights, preprocessing, precision), the views and their seed. It consists of Parquet
parts cut at fixed places, each of which is there whole or not at all. So a restart makes the missing parts only, and
two runs at once on one store write the same bytes.

Legend: n images, V views, C width of an encoder's features, S side of its images.
"""

from rayjobs.errors import UserError
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
import torch
from pydantic import Field
from ray.data import ActorPoolStrategy
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from cafo.images import Preprocess, load_image
from cafo.errors import ImageError
from cafo.prompt import zero_shot_classifier
from cafo.encoder_spec import EncoderSpec
from rayjobs.config import config
from rayjobs.models.encoder import VisionEncoderConfig, EncoderInfo, load_vision_encoder
from rayjobs.data.image_list import ImageList
from rayjobs.data.image_source import STORE_IMAGES, part_name
from rayjobs.cluster.shared_storage import assert_shared_storage
from rayjobs.storage.download import cached_path
from rayjobs.storage.paths import resolve_path
from rayjobs.console import Progress
from rayjobs.cluster.ray_data import ray_data_context
from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.storage.files import atomic_path, read_parquet, write_parquet
from rayjobs.storage.fingerprint import file_fingerprints, fingerprint


VIEWS_PER_PART = STORE_IMAGES
"""Views of images encoded and written together; at 224 pixels 39 MB on their way to the encoder."""


@config
class FeaturesConfig:
    """How images become features."""

    views: int = Field(default=10, ge=1)
    """Augmented views of every training image; trials may use the first few of them."""
    seed: int = 0
    """Of the views."""
    min_area: float = Field(default=0.5, gt=0, le=1)
    """The smallest share of an image that a view shows; near 1 where a class lies in the whole layout of the image."""
    flips: bool = True
    """Mirror half of the views; off where a mirror image is another class or none, as with letters and digits."""
    batch: int = Field(default=64, ge=1)
    """Views that an encoder reads at once."""
    max_rejected_fraction: float = Field(default=0.05, ge=0, le=1)
    """Stop if more than this share of a list's images cannot be read."""


class Rejected(NamedTuple):
    """An image that could not be used."""

    role: str
    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Features:
    """A list's features."""

    rows: tuple[int, ...]
    """The places in the list of the images that could be read."""
    values: Mapping[str, np.ndarray]
    """encoder → (V, n, C) float32 of unit norm"""
    rejected: tuple[Rejected, ...]
    stores: Mapping[str, str]
    """encoder → the name of its store, which stands for all that the features depend on"""


def open_encoders(encoders: Mapping[str, VisionEncoderConfig]) -> dict[str, EncoderInfo]:
    """Every encoder's identity and preprocessing. Raises ValueError for one that does not load."""
    from cafo.encoders import ClipEncoder  # seconds, which tasks that hold no encoder can spare

    infos = {}
    for name, encoder in encoders.items():
        loaded = load_vision_encoder(encoder.spec())
        infos[name] = EncoderInfo(encoder.spec(), loaded.identity, loaded.preprocess, isinstance(loaded, ClipEncoder))
    return infos


def prepare_features(
    lists: Sequence[ImageList],
    encoders: Mapping[str, EncoderInfo],
    settings: FeaturesConfig,
    cache: Path,
    *,
    workers: int,
    resources: Mapping[str, float],
) -> dict[str, Features]:
    """The features of each list by its role; what the stores lack is encoded by a pool of actors.

    Raises ValueError if too many images of a list cannot be read.
    """
    folders = fill_store(lists, encoders, settings, cache, workers=workers, resources=resources)
    found = {images.role: _read(images, folders[images.role]) for images in lists}
    for images in lists:
        rejected = found[images.role].rejected
        if len(rejected) > settings.max_rejected_fraction * len(images.items):
            raise UserError(
                f"{len(rejected)} of {len(images.items)} {images.role} images cannot be read, over "
                f"features.max_rejected_fraction={settings.max_rejected_fraction}; the first: {rejected[0].reason}"
            )
    return found


def fill_store(
    lists: Sequence[ImageList],
    encoders: Mapping[str, EncoderInfo],
    settings: FeaturesConfig,
    cache: Path,
    *,
    workers: int,
    resources: Mapping[str, float],
) -> dict[str, dict[str, Path]]:
    """{role: {encoder: its folder}}, whole: what the stores lack is encoded by a pool of actors."""
    paths: dict[str, list[str]] = {}
    for images in lists:
        paths.setdefault(images.root, []).extend(item.path for item in images.items)
    content = {root: file_fingerprints(root, names) for root, names in paths.items()}
    folders = {images.role: _folders(images, content[images.root], encoders, settings, cache) for images in lists}
    chunks = [chunk for images in lists for chunk in _missing(images, folders[images.role], settings)]
    if chunks:
        for folder in {folder for made in folders.values() for folder in made.values()}:
            folder.mkdir(parents=True, exist_ok=True)
        _encode(chunks, encoders, settings, workers, dict(resources))
    return folders


def _device(resources: Mapping[str, float]) -> str:
    return "cuda" if resources.get("GPU") else "cpu"


def _folders(
    images: ImageList,
    content: Mapping[str, str | None],
    encoders: Mapping[str, EncoderInfo],
    settings: FeaturesConfig,
    cache: Path,
) -> dict[str, Path]:
    """The folder of each encoder's store."""
    files = [[item.path, content[item.path]] for item in images.items]
    drawn = [settings.seed, settings.min_area, settings.flips] if images.views else None
    views = [images.views, drawn, VIEWS_PER_PART]
    return {
        name: cache / "features" / fingerprint(["features", 2, encoder.identity, views, files])[:20]
        for name, encoder in encoders.items()
    }


def _parts(images: ImageList) -> list[tuple[int, str]]:
    """First image and file name of each part."""
    step = max(1, VIEWS_PER_PART // max(images.views, 1))
    return [(first, part_name(first)) for first in range(0, len(images.items), step)]


def _missing(images: ImageList, folders: Mapping[str, Path], settings: FeaturesConfig) -> list[dict[str, str]]:
    """A row per part that some encoder lacks: its images, and where each lacking encoder's part goes."""
    starts = [first for first, _ in _parts(images)]
    made = {name: {file.name for file in folder.glob("*.parquet")} for name, folder in folders.items()}
    chunks = []
    for (first, part), stop in zip(_parts(images), [*starts[1:], len(images.items)], strict=True):
        lacking = {name: str(folder / part) for name, folder in folders.items() if part not in made[name]}
        if lacking:
            chunk = {
                "root": str(resolve_path(images.root)),
                "role": images.role,
                "first": first,
                "paths": [item.path for item in images.items[first:stop]],
                "views": images.views,
                "seed": settings.seed,
                "augment": {"min_area": settings.min_area, "flips": settings.flips},
                "parts": lacking,
            }
            chunks.append({"chunk": json.dumps(chunk)})
    return chunks


def _encode(
    chunks: list[dict[str, str]],
    encoders: Mapping[str, EncoderInfo],
    settings: FeaturesConfig,
    workers: int,
    resources: dict[str, float],
) -> None:
    total = sum(len(json.loads(chunk["chunk"])["paths"]) for chunk in chunks)
    spare = ray.cluster_resources().get("CPU", 0) - workers * resources["CPU"]
    roomy = spare >= 0.9 * len(ray.nodes())  # then some node has so much to spare, wherever the workers are
    with (
        ray_data_context(preserve_order=False),
        reraise_user_errors(),
        Progress("encode", unit="images", total=total) as bar,
    ):
        decoded = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(
            decode_chunk,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=0.9 if roomy else 0.4,  # other than the encoder's, or Ray would fuse the two
            fn_kwargs={"preprocess": {name: encoder.preprocess for name, encoder in encoders.items()}},
        )
        written = decoded.map_batches(
            ChunkEncoder,
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=workers),
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            fn_constructor_args=(dict(encoders), settings.batch, _device(resources)),
        )
        for row in written.iter_rows():
            bar.advance(row["images"])


def decode_chunk(table: pa.Table, preprocess: Mapping[str, Preprocess]) -> pa.Table:
    """Reads a part's images, each once, and makes the views each lacking encoder wants: (n * V, 3, S, S) float32.

    Encoders of equal preprocessing share one column.
    """
    chunk = json.loads(table["chunk"][0].as_py())
    wanted = {name: preprocess[name] for name in chunk["parts"]}
    kinds = list(dict.fromkeys(wanted.values()))
    pixels: list[list[np.ndarray]] = [[] for _ in kinds]
    chunk |= {"columns": {name: kinds.index(kind) for name, kind in wanted.items()}, "rows": [], "rejected": []}
    root = resolve_path(chunk["root"])
    for row, path in enumerate(chunk["paths"], chunk["first"]):
        try:
            image = load_image(root / path, name=path)
        except ImageError as error:
            chunk["rejected"].append([path, str(error)])
            continue
        chunk["rows"].append(row)
        for views, kind in zip(pixels, kinds, strict=True):
            if chunk["views"]:
                seed, augment = chunk["seed"], chunk["augment"]
                views += [kind.view(image, path, i, seed, **augment).numpy() for i in range(chunk["views"])]
            else:
                views.append(kind(image).numpy())
    columns = {
        f"pixels{i}": pa.array([b"".join(view.tobytes() for view in views)], pa.large_binary())
        for i, views in enumerate(pixels)
    }
    # every row needs the same columns, also where fewer encoders lack the part
    columns |= {f"pixels{i}": pa.array([b""], pa.large_binary()) for i in range(len(kinds), len(preprocess))}
    return pa.table({"chunk": [json.dumps(chunk)], **columns})


class ChunkEncoder:
    """An actor that holds the encoders, and writes the parts."""

    def __init__(self, encoders: Mapping[str, EncoderInfo], batch: int, device: str) -> None:
        self.encoders, self.batch = encoders, batch
        self.models = {name: load_vision_encoder(encoder.spec, device) for name, encoder in encoders.items()}

    def __call__(self, table: pa.Table) -> pa.Table:
        chunk = json.loads(table["chunk"][0].as_py())
        assert_shared_storage(*(resolve_path(part).parent for part in chunk["parts"].values()))
        n = len(chunk["rows"])
        for name, part in chunk["parts"].items():
            model = self.models[name]
            side, views = model.preprocess.size, max(chunk["views"], 1)
            buffer = table[f"pixels{chunk['columns'][name]}"][0].as_buffer()
            pixels = np.frombuffer(buffer, np.float32).reshape(n * views, 3, side, side)
            encoded = [
                self.encoders[name].features(model, torch.tensor(pixels[at : at + self.batch])).numpy()
                for at in range(0, n * views, self.batch)
            ]
            features = np.concatenate(encoded) if encoded else np.empty((0, model.width), np.float32)
            flat = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), views * features.shape[1])
            columns = pa.table({"row": pa.array(chunk["rows"], pa.int64()), "features": flat})
            about = {"views": str(views), "rejected": json.dumps(chunk["rejected"])}
            write_parquet(part, columns.replace_schema_metadata(about))
        return pa.table({"images": [len(chunk["paths"])], "rejected": [len(chunk["rejected"])]})


def _read(images: ImageList, folders: Mapping[str, Path]) -> Features:
    """Of the images that every encoder could read."""
    rejected: dict[str, Rejected] = {}
    read: list[set[int]] = []
    for folder in folders.values():
        read.append(set())
        for _, part in _parts(images):
            table = read_parquet(folder / part, columns=["row"])
            read[-1].update(table["row"].to_pylist())
            for path, reason in json.loads(table.schema.metadata[b"rejected"]):
                rejected.setdefault(path, Rejected(images.role, path, reason))
    rows = sorted(set.intersection(*read))
    values = {}
    for name, folder in folders.items():
        done = 0
        for _, part in _parts(images):
            table = read_parquet(folder / part)
            table = table.filter(pc.is_in(table["row"], pa.array(rows, pa.int64())))
            views = int(table.schema.metadata[b"views"])
            width = table.schema.field("features").type.list_size // views
            if name not in values:
                values[name] = np.empty((views, len(rows), width), np.float32)
            flat = table["features"].combine_chunks().flatten().to_numpy()
            values[name][:, done : done + len(table)] = flat.reshape(len(table), views, width).swapaxes(0, 1)
            done += len(table)
    stores = {name: folder.name for name, folder in folders.items()}
    return Features(rows=tuple(rows), values=values, rejected=tuple(rejected.values()), stores=stores)
