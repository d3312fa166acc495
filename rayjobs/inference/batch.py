"""Answers to many prompts: chunks of records, images decoded by Ray Data, a pool of workers, one file per chunk.

Each chunk's file is there whole or not at all, so the same call goes on where another stopped. Images are decoded ahead
of the workers, which hold the base and the encoder; one that cannot be read is told in `image_error`, and its record is
answered without it.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from torch import Tensor

from adapter.model import AdaptedModel
from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.cluster.ray_data import ray_data_context
from rayjobs.cluster.ray_init import connect
from rayjobs.cluster.shared_storage import assert_shared_storage
from rayjobs.cluster.worker_pool import WorkerPoolConfig
from rayjobs.console import Progress
from rayjobs.errors import UserError
from rayjobs.models.base_model import BaseModelConfig
from rayjobs.models.image_conditioning import ImageConditioning, ImageFeaturizer
from rayjobs.runs.provenance import lock_provenance
from rayjobs.storage.files import read_parquet, write_parquet
from rayjobs.storage.paths import resolve_path

Record = dict[str, Any]
Answer = Callable[[list[Record], list[Tensor | None]], list[Record]]
IDENTITY = "settings.json"
"""Among the parts: what they were made from."""


class GenerationWorker:
    """An actor that holds the base, its adapter and the encoder, and writes the answers of one chunk per call."""

    def __init__(
        self,
        make: Callable[[AdaptedModel], Answer],
        schema: pa.Schema,
        base: BaseModelConfig,
        adapter: str | None,
        conditioning: ImageConditioning | None,
        device: str,
    ) -> None:
        self.schema = schema
        self.featurizer = None if conditioning is None else ImageFeaturizer(conditioning.encoder, device)
        self.answer = make(base.load(adapter, device, encoder=conditioning and conditioning.encoder.identity))

    def __call__(self, table: pa.Table) -> pa.Table:
        (row,) = table.to_pylist()
        assert_shared_storage(resolve_path(row["part"]).parent)
        records = json.loads(row["records"])
        rows = self.answer(records, self.see(row.get("images") or [None] * len(records)))
        write_parquet(row["part"], pa.Table.from_pylist(rows, self.schema))
        return pa.table({"answered": [len(rows)]})

    def see(self, pixels: list[bytes | None]) -> list[Tensor | None]:
        """Each record's features (F,), or None."""
        there = [one for one in pixels if one is not None]
        found = iter(self.featurizer.features(there)) if self.featurizer is not None and there else iter(())
        return [None if one is None else next(found) for one in pixels]


def decode_images(table: pa.Table, root: str, conditioning: ImageConditioning) -> pa.Table:
    """A chunk's images as pixels."""
    (row,) = table.to_pylist()
    records, pixels, folder = json.loads(row["records"]), [], resolve_path(root)
    for record in records:
        seen = None
        if record.get("image"):
            seen, record["image_error"] = read_pixels(folder / record["image"], conditioning)
        pixels.append(seen)
    images = pa.array([pixels], pa.list_(pa.large_binary()))
    return pa.table({"part": [row["part"]], "records": [json.dumps(records)], "images": images})


def read_pixels(path: Path, conditioning: ImageConditioning) -> tuple[bytes | None, str]:
    """An image's pixels as the encoder reads them, or why there are none."""
    from cafo.errors import ImageError
    from cafo.images import load_image

    try:
        return conditioning.encoder.preprocess(load_image(path)).numpy().tobytes(), ""
    except ImageError as error:
        return None, str(error)


def generate_all(
    records: Iterable[Record],
    make: Callable[[AdaptedModel], Answer],
    schema: pa.Schema,
    parts: Path,
    identity: Mapping[str, str],
    *,
    batch: int,
    base: BaseModelConfig,
    adapter: str | None,
    conditioning: ImageConditioning | None,
    images: str,
    scale: WorkerPoolConfig,
) -> pa.Table:
    """All answers, in the order of the records; those that `parts` holds already are not made again.

    make: base → a function from records and their images' features to rows of `schema`, pickled into the workers.
    images: the folder that the records' images start from. Raises ValueError if `parts` was made with another identity,
    or there is no record.
    """
    lock_provenance(parts / IDENTITY, identity, way_out="remove it, or write somewhere else")
    files: list[Path] = []
    todo, total, done, rest = [], 0, 0, iter(records)
    while chunk := list(islice(rest, batch)):
        files.append(parts / f"{len(files):08d}.parquet")
        total += len(chunk)
        if files[-1].exists():
            done += len(chunk)
        else:
            todo.append({"part": str(files[-1]), "records": json.dumps(chunk)})
    if not files:
        raise UserError("there is not one record to answer")
    if todo:
        connect(parts)
        resources = scale.resources()
        progress = Progress("answer", unit="answers", total=total, done=done)
        with ray_data_context(preserve_order=False), reraise_user_errors(), progress as bar:
            chunks = ray.data.from_items(todo, override_num_blocks=len(todo))
            if conditioning is not None:
                chunks = chunks.map_batches(
                    decode_images,
                    batch_size=1,
                    batch_format="pyarrow",
                    num_cpus=0.01,  # other than the workers', or Ray would fuse the two
                    compute=TaskPoolStrategy(size=scale.workers.max),  # or there would be a process for every chunk
                    fn_kwargs={"root": images, "conditioning": conditioning},
                )
            answered = chunks.map_batches(
                GenerationWorker,
                batch_size=1,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(size=min(scale.workers.max, len(todo))),
                num_cpus=resources["CPU"],
                num_gpus=resources.get("GPU", 0),
                fn_constructor_args=(make, schema, base, adapter, conditioning, "cuda" if "GPU" in resources else "cpu"),
            )
            for row in answered.iter_rows():
                bar.advance(int(row["answered"]))
    return pa.concat_tables([read_parquet(file) for file in files])
