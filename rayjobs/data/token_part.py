"""The records of a token store on disk, in parts of which single records can be read.

A part is two files. `NAME.parquet` is its index, with a row for each record: about three bytes, of which a worker reads
all, since where a step is cut depends on the lengths of all its records. `NAME.bin` holds the records themselves, one
after the other, of which a worker reads its own: int32 of least byte first, the tokens and then, for each label span,
its first token and one past its last.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from adapter.records.example import count_labels
from rayjobs.storage.counted_reader import CountedReader
from rayjobs.storage.files import parse_index, values_path, whole_index, write_bytes, write_index

INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),  # source * ROWS_PER_SOURCE + position of the record in the source
        ("image", pa.int64()),  # index of the image in the source's list; null without one
        ("tokens", pa.int32()),  # number of tokens
        ("labels", pa.int32()),  # number of tokens that have labels
        ("spans", pa.int32()),  # number of label spans
    ]
)

VALUE = np.dtype("<i4")


@dataclass(frozen=True)
class RecordIndex:
    """An index of records from several parts."""

    folder: str
    """folder of the parts"""
    files: tuple[str, ...]
    """names of the parts"""
    table: pa.Table
    """`INDEX_SCHEMA`, and of each record: `file`, the number of its part; `start` and `stop`, its bytes there"""

    def take(self, positions: np.ndarray) -> "RecordIndex":
        """Return the index of the records at some positions, in this order."""
        return RecordIndex(self.folder, self.files, self.table.take(positions))


def part_name(split: str, first: int) -> str:
    """Return the file name of a part's index, from its split and the id of its chunk's first record."""
    return f"{split}-{first:014x}.parquet"


def write_part(path: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Write the two files of a part.

    Args:
        path: path of the index.
        records: id, tokens, label_spans and, if there is one, the index of the image of each record.
    """
    values = [np.array([*record["tokens"], *chain(*record["label_spans"])], VALUE) for record in records]
    write_bytes(values_path(path), b"".join(value.tobytes() for value in values))
    rows = [
        {
            "id": record["id"],
            "image": record.get("image"),
            "tokens": len(record["tokens"]),
            "labels": count_labels(record["label_spans"]),
            "spans": len(record["label_spans"]),
        }
        for record in records
    ]
    write_index(path, pa.Table.from_pylist(rows, INDEX_SCHEMA))


def read_index(folder: str, files: Sequence[str], reader: CountedReader) -> RecordIndex:
    """Return the index of some parts, one after the other.

    Args:
        folder: folder of the parts.
        files: names of the parts.
        reader: reads, and counts the bytes.

    Raises:
        StorageError: a file cannot be read.
        DataError: a file is damaged.
    """
    tables = [_read_part_index(f"{folder}/{name}", number, reader) for number, name in enumerate(files)]
    return RecordIndex(folder, tuple(files), pa.concat_tables(tables))


def _read_part_index(path: str, number: int, reader: CountedReader) -> pa.Table:
    table = parse_index(reader.read(path), path)
    with whole_index(path):
        table = table.select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA)
        if empty := [name for name in ("tokens", "spans") if table[name].null_count]:
            raise ValueError(f"{empty[0]} lacks values")
    values = table["tokens"].to_numpy().astype(np.int64) + 2 * table["spans"].to_numpy()
    stops = np.cumsum(values) * VALUE.itemsize
    table = table.append_column("file", pa.array(np.full(len(table), number, np.int32)))
    table = table.append_column("start", pa.array(stops - values * VALUE.itemsize))
    return table.append_column("stop", pa.array(stops))


def read_records(index: RecordIndex, reader: CountedReader) -> list[dict[str, Any]]:
    """Return the records of an index: id, tokens, label_spans and the index of the image.

    Raises:
        StorageError: a file cannot be read.
        DataError: a file was cut short.
    """
    rows = index.table.select(["id", "image", "tokens", "file", "start", "stop"]).to_pylist()
    by_file: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_file.setdefault(row["file"], []).append(row)
    for file, listed in by_file.items():
        path = values_path(f"{index.folder}/{index.files[file]}")
        contents = reader.read_ranges(path, [(row["start"], row["stop"]) for row in listed])
        for row, content in zip(listed, contents, strict=True):
            row["values"] = np.frombuffer(content, VALUE)
    return [_record(row) for row in rows]


def _record(row: Mapping[str, Any]) -> dict[str, Any]:
    values, count = row["values"], row["tokens"]
    return {
        "id": row["id"],
        "tokens": values[:count].tolist(),
        "label_spans": values[count:].reshape(-1, 2).tolist(),
        "image": row["image"],
    }
