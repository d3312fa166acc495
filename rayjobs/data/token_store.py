"""Records as tokens on disk: read and encoded once by Ray Data, then streamed by every epoch of every run.

A store is a folder whose name is a fingerprint of all that its content depends on. It has parts for each split
(`rayjobs.data.token_part`), and `index.json`, which is written last: a folder without it is unfinished and is made
again. The reader cuts chunks at fixed positions, so a store does not depend on the machine or the parallelism that made
it.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray.data
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from adapter.records.encoding import encode_record, encode_text
from adapter.records.example import Example
from adapter.templates import Template, template_fields
from adapter.tokenizers.base import Tokenizer
from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.cluster.ray_data import ray_data_context
from rayjobs.cluster.worker_pool import TASK_CPUS
from rayjobs.console import Progress
from rayjobs.data.image_source import read_image
from rayjobs.data.records import RecordsConfig, Source
from rayjobs.data.rejected import check_rejected_share, write_rejected
from rayjobs.data.templates import source_templates
from rayjobs.data.token_part import part_name, write_part
from rayjobs.data.trained_records import is_held_out
from rayjobs.errors import DataError
from rayjobs.models.base_model import open_tokenizer
from rayjobs.runs.run_dir import REJECTED_FILE
from rayjobs.storage.counted_reader import CountedReader
from rayjobs.storage.files import read_jsonl, read_parquet, read_typed, write_json, write_jsonl
from rayjobs.storage.fingerprint import file_fingerprints, fingerprint
from rayjobs.storage.paths import resolve_path

if TYPE_CHECKING:
    from adapter.adapter_file import AdapterFile

logger = logging.getLogger(__name__)

Split = Literal["train", "val"]

RECORDS_PER_CHUNK = 1024
SMALL_BYTES = 4 << 20
"""Size of records, as JSON, up to which this process encodes them, in seconds: Ray Data needs longer to start."""
ROWS_PER_SOURCE = 1 << 40
"""Record ids are source * ROWS_PER_SOURCE + position, so they are unique and name the record's source."""
SHORTENED = "conversations that are too long and lost their oldest turns"
TOO_LONG = "oldest turns dropped from conversations that are too long"
UNLABELLED = "answers without labels, whose place in the chat template's text is not certain"
IMAGE_LISTS = "images.json"
"""File of a store: {source: image paths}."""


_KEYS = {"parts": dict[str, list[tuple[str, int]]], "rejected": int, "left_out": int, "changed_turns": dict[str, int]}
_INDEX: TypeAdapter[Any] = TypeAdapter(TypedDict("_Index", _KEYS))  # type: ignore[operator]


@dataclass(frozen=True, kw_only=True)
class TokenStore:
    """A finished store."""

    folder: str
    parts: dict[str, list[tuple[str, int]]]
    """split → (file name, rows) of its parts, in the order of the sources"""
    rejected: int
    """records that cannot be used"""
    images_left_out: int = 0
    """records that have an image, if images are left out"""
    changed_turns: Mapping[str, int] = field(default_factory=dict)
    """{what was done to turns of conversations, such as dropping or merging them: how often}"""

    def rows(self, split: Split) -> int:
        """Return the number of records of a split."""
        return sum(rows for _, rows in self.parts[split])

    def images(self, split: Split) -> int:
        """Return the number of records of a split that have an image."""
        return sum(self._count_images(name) for name, _ in self.parts[split])

    def _count_images(self, name: str) -> int:
        images = read_parquet(f"{self.folder}/{name}", columns=["image"])["image"]
        return len(images) - images.null_count

    @classmethod
    def read(cls, folder: str | Path) -> "TokenStore":
        """Read the index of a store. Raises DataError for a damaged one, and OSError."""
        way_out = f"; delete the folder {folder}, and the next run makes it again"
        index = read_typed(f"{folder}/index.json", _INDEX, "the index of a token store", way_out=way_out)
        return cls(folder=str(folder), images_left_out=index.pop("left_out"), **index)


@dataclass(frozen=True, kw_only=True)
class _Encoding:
    """The settings that the content of a store depends on."""

    tokenizer: str
    max_length: int
    val_fraction: float
    images: bool


def source_of(id: int) -> int:
    """Return the number of a record's source from the record's id."""
    return id // ROWS_PER_SOURCE


def part_source(name: str) -> int:
    """Return the number of the source of a part from its file name."""
    return source_of(int(name.partition("-")[2].partition(".")[0], 16))


def prepare_tokens(
    records: RecordsConfig,
    tokenizer: str | Path,
    cache: str | Path,
    *,
    saved: "AdapterFile | None" = None,
    preprocess: Any = None,
    run: Path | None = None,
) -> TokenStore:
    """Return the token store of some records; Ray Data makes it unless it exists.

    Args:
        records: the records, and those for validation.
        tokenizer: path or URL of the tokenizer.
        cache: the cache folder.
        saved: an adapter, whose template records are put into that name none (`rayjobs.data.templates`).
        preprocess: `cafo.images.Preprocess` of the vision encoder; a record whose image it cannot read is rejected.
            None leaves images out.
        run: a run folder, into which the list of rejected records is copied for the report.

    Raises:
        RecordError: a malformed file.
        DataError: no records, or too many that cannot be used.
    """
    sources = records.all_sources()
    templates = source_templates(sources, _tokenizer(str(tokenizer)), saved)
    for source in sources:  # a missing or unreadable file is an error now, and not in a worker
        logger.info("records: %s", source.describe())
    encoding = _Encoding(
        tokenizer=str(tokenizer),
        max_length=records.max_length,
        val_fraction=records.held_out_fraction,
        images=preprocess is not None,
    )
    image_lists = {i: source.image_paths() for i, source in enumerate(sources)} if encoding.images else {}
    folder = resolve_path(cache) / "tokens" / _store_key(encoding, sources, templates, image_lists)
    try:
        if not (folder / "index.json").exists():
            write_json(folder / IMAGE_LISTS, image_lists)
            _write_store(folder, sources, templates, encoding, preprocess)
    finally:
        if run and (folder / REJECTED_FILE).exists():
            write_jsonl(run / REJECTED_FILE, read_jsonl(folder / REJECTED_FILE))
    store = TokenStore.read(folder)
    _check_rejected(store, records.max_rejected_fraction)
    for change, count in store.changed_turns.items():
        logger.info("records: %s: %s", change, f"{count:,}")
    return store


def _check_rejected(store: TokenStore, allowed: float) -> None:
    """Raise DataError if more than the allowed share of the records, or all of them, cannot be used.

    The limit is no part of a store, so a store that exists is checked like a new one.
    """
    usable, listed = store.rows("train") + store.rows("val"), f"{store.folder}/{REJECTED_FILE}"
    reasons = [f"{row['file']}, {row['record']}: {row['reason']}" for row in read_jsonl(listed)]
    check_rejected_share(reasons, usable + len(reasons), allowed, "data.max_rejected_fraction", listed=listed)
    if not usable:
        raise DataError(f"none of {len(reasons)} records can be used; the first: {reasons[0]}; all of them: {listed}")


def _store_key(
    encoding: _Encoding, sources: list[Source], templates: Sequence[Template], image_lists: dict[int, list[str]]
) -> str:
    """Return a fingerprint of all that the content of a store depends on."""
    images = []
    for i, paths in image_lists.items():
        if paths:
            images += [[path, content] for path, content in file_fingerprints(sources[i].images, paths).items()]
    identity = {
        **asdict(encoding),
        "tokenizer": _tokenizer(encoding.tokenizer).fingerprint,
        "sources": [
            [
                source.role,
                source.format,
                dict(source.columns),
                source.split,
                template_fields(template),
                source.digests(),
            ]
            for source, template in zip(sources, templates, strict=True)
        ],
        "images": images,
        "format": 6,
    }
    return fingerprint(identity)[:20]


def _write_store(
    folder: Path, sources: list[Source], templates: Sequence[Template], encoding: _Encoding, preprocess: Any
) -> None:
    """Write the parts, the rejected records and the index of a store."""
    arguments = {"folder": folder, "templates": templates, "encoding": encoding, "preprocess": preprocess}
    parts: dict[str, list[tuple[str, int]]] = {"train": [], "val": []}
    rejected: list[dict[str, Any]] = []
    left_out, changed = 0, Counter[str]()
    with reraise_user_errors(), Progress("tokenize", unit="records") as progress:
        for row in _encode_chunks(sources, arguments):
            for split in parts:
                if row[split]:
                    parts[split].append((part_name(split, row["first"]), int(row[split])))
            rejected += json.loads(row["rejected"])
            left_out += int(row["left_out"])
            changed.update(json.loads(row["changed_turns"]))
            progress.advance(int(row["records"]))
    for listed in parts.values():
        listed.sort()
    if not rejected and not any(parts.values()):
        raise DataError(f"no records in {', '.join(source.path for source in sources)}; check data.path")
    write_rejected(folder, rejected)
    index = {"parts": parts, "rejected": len(rejected), "left_out": left_out, "changed_turns": changed}
    write_json(folder / "index.json", index)


def _encode_chunks(sources: Sequence[Source], arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the reports of all chunks, which this process writes if they are small, and Ray Data's tasks otherwise.

    arguments: those of `_write_chunk` besides the chunk.
    """
    items = [{"number": number, "source": source} for number, source in enumerate(sources)]
    small = None if arguments["preprocess"] else _read_small(items)
    if small is not None:
        for chunk in small:
            yield {name: value for name, (value,) in _write_chunk(chunk, **arguments).items()}
        return
    with ray_data_context(preserve_order=True):
        source_rows = ray.data.from_items(items, override_num_blocks=len(items))
        # With the CPUs of the next stage, Ray Data would fuse the two and encode a whole file in one task.
        chunks = source_rows.map_batches(_read_chunks, batch_size=1, num_cpus=TASK_CPUS)
        yield from chunks.map_batches(_write_chunk, batch_size=1, fn_kwargs=arguments).iter_rows()


def _read_small(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Return the chunks of all sources, or None if they are larger than SMALL_BYTES together."""
    chunks, size = [], 0
    for item in items:
        for chunk in _read_chunks({name: [value] for name, value in item.items()}):
            size += len(chunk["records"][0])
            if size > SMALL_BYTES:
                return None
            chunks.append(chunk)
    return chunks


def _read_chunks(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Read a source and yield chunks of RECORDS_PER_CHUNK records as JSON, each with the index of its image."""
    source: Source = batch["source"][0]
    first = int(batch["number"][0]) * ROWS_PER_SOURCE
    image_indices: dict[str, int] = {}

    def read_indexed() -> Iterator[dict[str, Any]]:
        for record in source.read():
            image = record["image"]
            index = image_indices.setdefault(image, len(image_indices)) if image else None
            yield {**record, "image_index": index}

    records = read_indexed()
    while chunk := list(islice(records, RECORDS_PER_CHUNK)):
        yield {"first": [first], "source": [source], "records": [json.dumps(chunk)]}
        first += len(chunk)


def _write_chunk(
    batch: dict[str, Any], folder: Path, templates: Sequence[Template], encoding: _Encoding, preprocess: Any
) -> dict[str, Any]:
    """Encode a chunk and write its part of each split; return the counts and the rejected records."""
    first, records = int(batch["first"][0]), json.loads(batch["records"][0])
    source: Source = batch["source"][0]
    template = templates[source_of(first)]
    tokenizer = _tokenizer(encoding.tokenizer)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    rejected, changed = [], Counter[str]()
    for id, record in enumerate(records, first):
        image_index, notes = record.pop("image_index"), record.pop("notes", {})
        found = {"id": id, "file": source.path, "record": record.pop("place", f"record {id % ROWS_PER_SOURCE + 1}")}
        if reason := record.pop("rejected", ""):
            rejected.append({**found, "reason": reason, **record})
            continue
        try:
            if "text" in record:
                examples = encode_text(record, tokenizer, max_length=encoding.max_length)
            else:
                examples = [encode_record(record, tokenizer, template, max_length=encoding.max_length)]
            if encoding.images and image_index is not None:
                _check_image(source.images, record["image"], preprocess)
        except ValueError as error:  # RecordError, or ImageError for an image that cannot be read
            rejected.append({**found, "reason": str(error), **record})
            continue
        changed.update(notes)
        changed.update(_changes(examples))
        image = image_index if encoding.images else None
        side = "val" if source.role == "val" or is_held_out(record, encoding.val_fraction) else "train"
        rows[side] += [{"id": id, "tokens": e.ids, "label_spans": e.label_spans, "image": image} for e in examples]
    for side, listed in rows.items():
        if listed:
            write_part(f"{folder}/{part_name(side, first)}", listed)
    return {
        "first": [first],
        "records": [len(records)],
        "train": [len(rows["train"])],
        "val": [len(rows["val"])],
        "rejected": [json.dumps(rejected)],
        "changed_turns": [json.dumps(+changed)],
        "left_out": [0 if encoding.images else sum(bool(record["image"]) for record in records)],
    }


def _changes(examples: Sequence[Example]) -> Counter[str]:
    """Count what the encoding of a record left out."""
    counts = Counter[str]()
    for example in examples:
        counts[SHORTENED] += example.dropped_turns > 0
        counts[TOO_LONG] += example.dropped_turns
        counts[UNLABELLED] += example.unlabelled_turns
    return counts


@lru_cache(maxsize=64)
def _check_image(root: str, path: str, preprocess: Any) -> None:
    """Decode and crop an image, so that a broken one is found before training."""
    preprocess.crop(read_image(root, path, CountedReader()))


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return open_tokenizer(path)
