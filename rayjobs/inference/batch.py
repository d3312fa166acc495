"""Batch generation over many records: chunks of records, a pool of workers, one Parquet file per chunk.

A chunk's file exists completely or not at all, so the same call resumes an interrupted one; a file that was damaged
since is made again. Ray Data decodes the images ahead of the workers, which hold the model and the image encoder. A
record whose image cannot be read comes to the task without it, and its `image_error` says why.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from torch import Tensor

from adapter.model import AdaptedModel
from rayjobs.cluster.device import worker_device
from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.cluster.ray_data import ray_data_context
from rayjobs.cluster.ray_init import connect
from rayjobs.cluster.shared_storage import assert_shared_storage
from rayjobs.cluster.worker_pool import TASK_CPUS, WorkerPoolConfig, actor_cpus
from rayjobs.console import Progress
from rayjobs.errors import DataError
from rayjobs.inference.adapter_source import AdapterSourceConfig
from rayjobs.models.image_conditioning import ImageConditioning, ImageFeaturizer
from rayjobs.runs.provenance import lock_provenance
from rayjobs.storage.files import read_parquet, write_parquet
from rayjobs.storage.paths import resolve_path

logger = logging.getLogger(__name__)

Record = dict[str, Any]
GenerationTask = Callable[[AdaptedModel, list[Record], list[Tensor | None]], list[Record]]
"""(model, records, features (F,) of each record's image or None) → a row for each record."""

IDENTITY = "settings.json"
"""File beside the chunks' files: what the rows depend on."""


class Chunk(NamedTuple):
    """Records that are processed together."""

    part: Path
    """the file of their rows"""
    records: str
    """as JSON: the fields differ from task to task, and a struct column would add absent ones as nulls"""
    size: int


@dataclass(frozen=True, kw_only=True)
class BatchGenerator:
    """Generates a row for every record with a pool of workers."""

    task: GenerationTask
    """makes the rows; pickled into the workers"""
    schema: pa.Schema
    """columns of the rows"""
    parts: Path
    """folder of the chunks' files"""
    identity: Mapping[str, Any]
    """what the rows depend on, by content"""
    chunk_size: int
    """records that one worker processes together"""
    model: AdapterSourceConfig
    conditioning: ImageConditioning | None
    """None leaves images out"""
    image_root: str
    """the folder that the records' image paths start from"""
    pool: WorkerPoolConfig

    def run(self, records: Iterable[Record]) -> pa.Table:
        """All rows in the order of the records; chunks whose file exists and is whole are not generated again.

        Raises:
            ProvenanceError: if `parts` was made with another identity.
            DataError: if there are no records.
        """
        lock_provenance(self.parts / IDENTITY, self.identity, hint="remove it, or write somewhere else")
        chunks = self._chunks(records)
        if not chunks:
            raise DataError("no records to generate from: the data has none")
        tables = {chunk.part: table for chunk in chunks if (table := self._read_part(chunk)) is not None}
        missing = [chunk for chunk in chunks if chunk.part not in tables]
        if missing:
            connect(self.parts)
            total, left = (sum(chunk.size for chunk in some) for some in (chunks, missing))
            progress = Progress("generate", unit="records", total=total, done=total - left)
            with ray_data_context(preserve_order=False), reraise_user_errors(), progress as bar:
                for row in self._generated(missing).iter_rows():
                    bar.advance(int(row["rows"]))
            tables |= {chunk.part: read_parquet(chunk.part) for chunk in missing}
        return pa.concat_tables([tables[chunk.part] for chunk in chunks])

    def _read_part(self, chunk: Chunk) -> pa.Table | None:
        """The rows of a chunk; None if they must be generated, because there is no file or it is damaged."""
        if not chunk.part.exists():
            return None
        try:
            table = read_parquet(chunk.part)
        except (DataError, OSError) as error:
            logger.warning("%s cannot be read and is made again: %s", chunk.part, " ".join(str(error).split()))
            return None
        if table.num_rows == chunk.size and table.schema.equals(self.schema):
            return table
        logger.warning("%s holds other rows than its records' and is made again", chunk.part)
        return None

    def _chunks(self, records: Iterable[Record]) -> list[Chunk]:
        remaining, chunks = iter(records), list[Chunk]()
        while chunk := list(islice(remaining, self.chunk_size)):
            chunks.append(Chunk(self.parts / f"{len(chunks):08d}.parquet", json.dumps(chunk), len(chunk)))
        return chunks

    def _generated(self, chunks: Sequence[Chunk]) -> ray.data.Dataset:
        """Rows {"rows": how many}, one for each chunk that a worker has written."""
        resources = self.pool.resources()
        items = [{"part": str(chunk.part), "records": chunk.records} for chunk in chunks]
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        if self.conditioning is not None:
            dataset = dataset.map_batches(
                decode_images,
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=TASK_CPUS,  # different from the actors' CPUs, or Ray Data would fuse the two stages
                compute=TaskPoolStrategy(size=self.pool.workers.max),  # bounds the number of processes
                fn_kwargs={"root": self.image_root, "conditioning": self.conditioning},
            )
        device = worker_device(resources)
        return dataset.map_batches(
            GenerationWorker,
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=min(self.pool.workers.max, len(items))),
            num_cpus=actor_cpus(resources),
            num_gpus=resources.get("GPU", 0),
            fn_constructor_args=(self.task, self.schema, self.model, self.conditioning, device),
        )


class GenerationWorker:
    """An actor that holds the model and the image encoder, and writes the rows of one chunk per call."""

    def __init__(
        self,
        task: GenerationTask,
        schema: pa.Schema,
        model: AdapterSourceConfig,
        conditioning: ImageConditioning | None,
        device: str,
    ) -> None:
        self.task, self.schema = task, schema
        self.featurizer = None if conditioning is None else ImageFeaturizer(conditioning.encoder, device)
        self.model = model.load(device, conditioning)
        self.model.prepack_weights()

    def __call__(self, table: pa.Table) -> pa.Table:
        (row,) = table.to_pylist()
        assert_shared_storage(resolve_path(row["part"]).parent)
        records = json.loads(row["records"])
        pixels = row.get("images") or [None] * len(records)
        rows = self.task(self.model, records, self.encode_images(pixels))
        write_parquet(row["part"], pa.Table.from_pylist(rows, self.schema))
        return pa.table({"rows": [len(rows)]})

    def encode_images(self, pixels: list[bytes | None]) -> list[Tensor | None]:
        """Features (F,) of each image, None where there is none."""
        images = [image for image in pixels if image is not None]
        features = iter(self.featurizer.features(images)) if self.featurizer is not None and images else iter(())
        return [None if image is None else next(features) for image in pixels]


def decode_images(table: pa.Table, root: str, conditioning: ImageConditioning) -> pa.Table:
    """Add the pixels of a chunk's images to its row, and `image_error` to the records whose image cannot be read."""
    (row,) = table.to_pylist()
    records, folder = json.loads(row["records"]), resolve_path(root)
    all_pixels = []
    for record in records:
        pixels = None
        if record.get("image"):
            pixels, record["image_error"] = read_pixels(folder / record["image"], conditioning)
        all_pixels.append(pixels)
    images = pa.array([all_pixels], pa.list_(pa.large_binary()))
    return pa.table({"part": [row["part"]], "records": [json.dumps(records)], "images": images})


def read_pixels(path: Path, conditioning: ImageConditioning) -> tuple[bytes | None, str]:
    """An image's pixels, preprocessed for the encoder, and ""; or None, and why the image cannot be read."""
    from cafo.errors import ImageError
    from cafo.images import load_image

    try:
        return conditioning.encoder.preprocess(load_image(path)).numpy().tobytes(), ""
    except ImageError as error:
        return None, str(error)
