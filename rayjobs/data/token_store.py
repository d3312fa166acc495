"""Records → a token store: read and encoded once by Ray Data, then streamed by every epoch of every run.

A store is a folder named after everything its content depends on, with Parquet parts per split and `index.json`, which
is written last: a folder without it is unfinished and is made again. Chunks are cut by the reader at fixed places, so a
store is the same whatever machine or parallelism made it.
"""

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
import pyarrow as pa
import pyarrow.parquet as pq
from rayjobs.storage.paths import is_url, resolve_path, upload_file
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Literal
import ray.data
from adapter.instruct import encode_record
from adapter.errors import RecordError
from adapter.tokenizer import Tokenizer
from rayjobs.data.image_source import read_image
from rayjobs.storage.download import cached_path
from rayjobs.storage.paths import resolve_path
from rayjobs.data.records import RecordsConfig, Source
from rayjobs.console import Progress
from rayjobs.cluster.ray_data import ray_data_context
from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.storage.fingerprint import file_fingerprint, file_fingerprints, fingerprint
from rayjobs.storage.files import read_json, read_jsonl, read_parquet, write_json, write_jsonl, write_parquet
from rayjobs.storage.files import write_json
from rayjobs.storage.files import read_json
from rayjobs.storage.files import write_jsonl
from rayjobs.storage.files import read_jsonl
from rayjobs.storage.files import write_parquet
from rayjobs.storage.files import read_parquet


TOKEN_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),  # the record's place in the sources: source * 2^40 + row
        ("tokens", pa.list_(pa.int32())),
        ("label_start", pa.int32()),  # tokens[label_start:] are labelled
        ("image", pa.int64()),  # the image's place in the source's list; null without one
    ]
)

Split = Literal["train", "val"]

CHUNK_RECORDS = 1024
ROWS_PER_SOURCE = 1 << 40
"""Record ids are source * ROWS_PER_SOURCE + row, so they are unique and say where a record stands."""
IMAGE_LISTS = "images.json"
REJECTED = "rejected.jsonl"


@dataclass(frozen=True, kw_only=True)
class TokenStore:
    """A finished store: its folder, and per split the parts in source order as (file name, rows)."""

    folder: str
    parts: dict[str, list[tuple[str, int]]]
    rejected: int
    images_left_out: int = 0
    """Records that have an image which nothing reads."""

    def rows(self, split: Split) -> int:
        return sum(rows for _, rows in self.parts[split])

    def images(self, split: Split) -> int:
        """Records that have an image."""
        return sum(self._with_image(name) for name, _ in self.parts[split])

    def _with_image(self, name: str) -> int:
        images = read_parquet(f"{self.folder}/{name}", columns=["image"])["image"]
        return len(images) - images.null_count

    @classmethod
    def read(cls, folder: str | Path) -> "TokenStore":
        index = read_json(f"{folder}/index.json")
        parts = {split: [(name, rows) for name, rows in listed] for split, listed in index["parts"].items()}
        return cls(folder=str(folder), parts=parts, rejected=index["rejected"], images_left_out=index["left_out"])


@dataclass(frozen=True, kw_only=True)
class _Encoding:
    """All that decides a store's content besides the files."""

    tokenizer: str
    max_length: int
    val_fraction: float
    images: bool


def source_of(id: int) -> int:
    """The source that a record stands in."""
    return id // ROWS_PER_SOURCE


def part_source(name: str) -> int:
    """The source that a store's part was made of."""
    return source_of(int(name.partition("-")[2].partition(".")[0], 16))


def prepare_tokens(
    records: RecordsConfig,
    tokenizer: str | Path,
    cache: str | Path,
    *,
    val_sources: Sequence[Source] = (),
    val_fraction: float = 0.0,
    preprocess: Any = None,
    run: Path | None = None,
) -> TokenStore:
    """The token store of some records, made by Ray Data unless it stands already.

    preprocess: `cafo.images.Preprocess` of the encoder; a record whose image cannot be read by it is set aside like one
    without a label. Without it, images are left out.
    run: the folder of a run, which is told the records that cannot be used, each with its reason, for its report.

    Raises RecordError if a file is malformed, or too many records cannot be used.
    """
    images = preprocess is not None
    encoding = _Encoding(
        tokenizer=str(tokenizer), max_length=records.max_length, val_fraction=val_fraction, images=images
    )
    sources = [(source, "train") for source in records.sources()] + [(source, "val") for source in val_sources]
    for source, _ in sources:
        next(iter(source.read()), None)  # a missing or unreadable file is told at once
    lists = {i: source.image_paths() for i, (source, _) in enumerate(sources)} if images else {}
    identity = {
        **asdict(encoding),
        "tokenizer": file_fingerprint(cached_path(tokenizer)),
        "sources": [
            [split, source.format, source.split, asdict(source.template), source.digests()] for source, split in sources
        ],
        "images": [
            [path, content]
            for i, paths in lists.items()
            if paths
            for path, content in file_fingerprints(sources[i][0].images, paths).items()
        ],
        "format": 3,
    }
    key = fingerprint(identity)[:20]
    folder = resolve_path(cache) / "tokens" / key
    try:
        if not (folder / "index.json").exists():
            write_json(folder / IMAGE_LISTS, lists)
            _write_store(folder, sources, encoding, preprocess, records.max_rejected_fraction)
    finally:
        if run and (folder / REJECTED).exists():
            write_jsonl(run / REJECTED, read_jsonl(folder / REJECTED))
    return TokenStore.read(folder)


def _write_store(
    folder: Path, sources: list[tuple[Source, str]], encoding: _Encoding, preprocess: Any, max_rejected: float
) -> None:
    items = [{"number": number, "source": source, "split": split} for number, (source, split) in enumerate(sources)]
    with ray_data_context(preserve_order=True):
        listed_files = ray.data.from_items(items, override_num_blocks=len(items))
        # Other resources than the next stage's, or Ray would fuse the two and encode a file in a single task.
        chunks = listed_files.map_batches(_read_chunks, batch_size=1, num_cpus=0.01)
        how = {"folder": folder, "encoding": encoding, "preprocess": preprocess}
        written = chunks.map_batches(_write_chunk, batch_size=1, fn_kwargs=how)
        parts: dict[str, list[tuple[str, int]]] = {"train": [], "val": []}
        left_out = 0
        rejected: list[dict[str, Any]] = []
        with reraise_user_errors(), Progress("tokenize", unit="records") as progress:
            for row in written.iter_rows():
                for split in parts:
                    if row[split]:
                        parts[split].append((f"{split}-{row['first']:014x}.parquet", int(row[split])))
                rejected += json.loads(row["rejected"])
                left_out += int(row["left_out"])
                progress.advance(int(row["records"]))
    for listed in parts.values():
        listed.sort()
    write_jsonl(folder / REJECTED, rejected)
    records = len(rejected) + sum(rows for listed in parts.values() for _, rows in listed)
    if not records:
        raise RecordError(f"{', '.join(source.path for source, _ in sources)}: there is not one record")
    if len(rejected) > max_rejected * records:
        raise RecordError(
            f"{len(rejected)} of {records} records cannot be used, over data.max_rejected_fraction={max_rejected}; "
            f"the first: {rejected[0]['reason']}; all of them: {folder / REJECTED}"
        )
    write_json(folder / "index.json", {"parts": parts, "rejected": len(rejected), "left_out": left_out})


def _read_chunks(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One source → rows of CHUNK_RECORDS records each, as JSON."""
    source, split = batch["source"][0], batch["split"][0]
    first = int(batch["number"][0]) * ROWS_PER_SOURCE
    places: dict[str, int] = {}

    def placed() -> Iterator[dict[str, Any]]:
        for record in source.read():
            place = places.setdefault(record["image"], len(places)) if record["image"] else None
            yield {**record, "place": place}

    records = placed()
    while chunk := list(islice(records, CHUNK_RECORDS)):
        yield {"first": [first], "split": [split], "source": [source], "records": [json.dumps(chunk)]}
        first += len(chunk)


def _write_chunk(batch: dict[str, Any], folder: Path, encoding: _Encoding, preprocess: Any) -> dict[str, Any]:
    """Encodes one chunk and writes its part of every split; returns what was written."""
    first, split, records = int(batch["first"][0]), batch["split"][0], json.loads(batch["records"][0])
    source: Source = batch["source"][0]
    tokenizer = _tokenizer(encoding.tokenizer)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    rejected = []
    for id, record in enumerate(records, first):
        place = record.pop("place") if encoding.images else None
        odd = record.pop("rejected", "")
        try:
            if odd:
                raise RecordError(odd)
            example = encode_record(record, tokenizer, source.template, max_length=encoding.max_length)
            if place is not None:
                _check_image(source.images, record["image"], preprocess)
        except ValueError as error:  # RecordError, or an image that cannot be read
            rejected.append({"id": id, "reason": str(error), **record})
            continue
        side = "val" if split == "val" or _held_out(record, encoding.val_fraction) else "train"
        rows[side].append({"id": id, "tokens": example.ids, "label_start": example.label_start, "image": place})
    for side, listed in rows.items():
        if listed:
            write_parquet(folder / f"{side}-{first:014x}.parquet", pa.Table.from_pylist(listed, TOKEN_SCHEMA))
    return {
        "first": [first],
        "records": [len(records)],
        "train": [len(rows["train"])],
        "val": [len(rows["val"])],
        "rejected": [json.dumps(rejected)],
        "left_out": [0 if encoding.images else sum(bool(record["image"]) for record in records)],
    }


@lru_cache(maxsize=64)
def _check_image(root: str, path: str, preprocess: Any) -> None:
    """Decodes and prepares an image, so that a bad one is known before training and not in the middle of it."""
    preprocess(read_image(root, path))


def _held_out(record: dict[str, str], fraction: float) -> bool:
    """By conversation, image or content, so that a record and its duplicates, and all that is asked about one image,
    fall on the same side, wherever they stand."""
    alone = "\0".join(record[name] for name in ("instruction", "input", "output"))
    digest = hashlib.sha256((record.get("group") or record["image"] or alone).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return Tokenizer(cached_path(path))
