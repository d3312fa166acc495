"""Instruction files → a token store: read and encoded once by Ray Data, then streamed by every epoch of every run.

A store is a folder named after everything its content depends on, with Parquet parts per split and `index.json`, which
is written last: a folder without it is unfinished and is made again. Chunks are cut by the reader at fixed places, so a
store is the same whatever machine or parallelism made it.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import ray.data
from pydantic import Field

from adapter.instruct import ALPACA, PromptTemplate, RecordError, encode_record, read_records
from adapter.tokenizer import Tokenizer
from rayjobs.config import config
from rayjobs.runtime import Progress, data_context, unwrapped
from rayjobs.tables import TOKENS, read_json, sha256_file, write_json, write_jsonl, write_parquet

Split = Literal["train", "val"]

CHUNK_RECORDS = 1024
ROWS_PER_FILE = 1 << 40
"""Record ids are file * ROWS_PER_FILE + row, so they are unique and say where a record stands."""


@config
class RecordsConfig:
    """Instruction records and how they become tokens."""

    path: list[str]
    """Files of records {instruction, input?, output}: .json (an array), .jsonl or .parquet."""
    template: str = "alpaca"
    """'alpaca', or a JSON file with 'with_input' and 'without_input' prompt templates."""
    max_length: int = Field(default=512, ge=2)
    """The longest sequence in tokens; longer records lose the left of their input, then the right of their output."""
    max_rejected_fraction: float = Field(default=0.05, ge=0, le=1)
    """Stop if more than this share of the records cannot be used."""

    def prompt_template(self) -> PromptTemplate:
        return ALPACA if self.template == "alpaca" else PromptTemplate.read(self.template)


@config
class DataConfig(RecordsConfig):
    """Instruction records to train on, and to validate on."""

    val_path: list[str] = Field(default_factory=list)
    """Held-out files; if none, a share of `path` is held out by a hash of each record's content."""
    val_fraction: float = Field(default=0.02, ge=0, lt=1)
    """The share of `path` held out for validation when `val_path` is empty; never trained on."""


@dataclass(frozen=True, kw_only=True)
class TokenStore:
    """A finished store: its folder, and per split the parts in source order as (file name, rows)."""

    folder: str
    parts: dict[str, list[tuple[str, int]]]
    rejected: int

    def rows(self, split: Split) -> int:
        return sum(rows for _, rows in self.parts[split])

    @classmethod
    def read(cls, folder: str | Path) -> "TokenStore":
        index = read_json(Path(folder) / "index.json")
        parts = {split: [(name, rows) for name, rows in listed] for split, listed in index["parts"].items()}
        return cls(folder=str(folder), parts=parts, rejected=index["rejected"])


@dataclass(frozen=True, kw_only=True)
class _Encoding:
    """All that decides a store's content besides the files."""

    tokenizer: str
    template: PromptTemplate
    max_length: int
    val_fraction: float


def prepare_tokens(
    records: RecordsConfig,
    tokenizer: str | Path,
    cache: str | Path,
    *,
    val_path: Sequence[str] = (),
    val_fraction: float = 0.0,
) -> TokenStore:
    """The token store of some records, made by Ray Data unless it stands already.

    Raises RecordError if a file is malformed, or too many records are left without a label.
    """
    encoding = _Encoding(
        tokenizer=str(tokenizer),
        template=records.prompt_template(),
        max_length=records.max_length,
        val_fraction=val_fraction,
    )
    sources = [(path, "train") for path in records.path] + [(path, "val") for path in val_path]
    for path, _ in sources:
        next(iter(read_records(path)), None)  # a missing or unreadable file is told at once
    identity = {
        **asdict(encoding),
        "tokenizer": sha256_file(tokenizer),
        "sources": [(split, sha256_file(path)) for path, split in sources],
        "format": 1,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
    folder = Path(cache) / "tokens" / key
    if not (folder / "index.json").exists():
        _write_store(folder, sources, encoding, records.max_rejected_fraction)
    return TokenStore.read(folder)


def _write_store(folder: Path, sources: list[tuple[str, str]], encoding: _Encoding, max_rejected: float) -> None:
    items = [{"file": file, "path": path, "split": split} for file, (path, split) in enumerate(sources)]
    with data_context(preserve_order=True):
        listed_files = ray.data.from_items(items, override_num_blocks=len(items))
        # Other resources than the next stage's, or Ray would fuse the two and encode a file in a single task.
        chunks = listed_files.map_batches(_read_chunks, batch_size=1, num_cpus=0.01)
        written = chunks.map_batches(_write_chunk, batch_size=1, fn_kwargs={"folder": folder, "encoding": encoding})
        parts: dict[str, list[tuple[str, int]]] = {"train": [], "val": []}
        rejected: list[dict[str, Any]] = []
        with unwrapped(), Progress("tokenize", unit="records") as progress:
            for row in written.iter_rows():
                for split in parts:
                    if row[split]:
                        parts[split].append((f"{split}-{row['first']:014x}.parquet", int(row[split])))
                rejected += json.loads(row["rejected"])
                progress.advance(int(row["records"]))
    for listed in parts.values():
        listed.sort()
    write_jsonl(folder / "rejected.jsonl", rejected)
    records = len(rejected) + sum(rows for listed in parts.values() for _, rows in listed)
    if not records:
        raise RecordError(f"{', '.join(path for path, _ in sources)}: there is not one record")
    if len(rejected) > max_rejected * records:
        raise RecordError(
            f"{len(rejected)} of {records} records cannot be used, over data.max_rejected_fraction={max_rejected}; "
            f"the first: {rejected[0]['reason']}; all of them: {folder / 'rejected.jsonl'}"
        )
    write_json(folder / "index.json", {"parts": parts, "rejected": len(rejected)})


def _read_chunks(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One source file → rows of CHUNK_RECORDS records each, as JSON."""
    file, path, split = (batch[name][0] for name in ("file", "path", "split"))
    records = read_records(path)
    first = int(file) * ROWS_PER_FILE
    while chunk := list(islice(records, CHUNK_RECORDS)):
        yield {"first": [first], "split": [split], "records": [json.dumps(chunk)]}
        first += len(chunk)


def _write_chunk(batch: dict[str, Any], folder: Path, encoding: _Encoding) -> dict[str, Any]:
    """Encodes one chunk and writes its part of every split; returns what was written."""
    first, split, records = int(batch["first"][0]), batch["split"][0], json.loads(batch["records"][0])
    tokenizer = _tokenizer(encoding.tokenizer)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    rejected = []
    for id, record in enumerate(records, first):
        try:
            example = encode_record(record, tokenizer, encoding.template, max_length=encoding.max_length)
        except RecordError as error:
            rejected.append({"id": id, "reason": str(error), **record})
            continue
        side = "val" if split == "val" or _held_out(record, encoding.val_fraction) else "train"
        rows[side].append({"id": id, "tokens": example.ids, "label_start": example.label_start})
    for side, listed in rows.items():
        if listed:
            write_parquet(folder / f"{side}-{first:014x}.parquet", pa.Table.from_pylist(listed, TOKENS))
    return {
        "first": [first],
        "records": [len(records)],
        "train": [len(rows["train"])],
        "val": [len(rows["val"])],
        "rejected": [json.dumps(rejected)],
    }


def _held_out(record: dict[str, str], fraction: float) -> bool:
    """By content, so that a record and its duplicates fall on the same side, wherever they stand."""
    digest = hashlib.sha256("\0".join([record["instruction"], record["input"], record["output"]]).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return Tokenizer(path)
