"""Read the rows of Parquet and Arrow files one by one, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter.errors import RecordError
from adapter.records.row import Row

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_PER_BATCH = 256


def read_parquet(path: Path) -> Iterator[Row]:
    """Read the rows of a Parquet file. Raises RecordError, naming the file and the place, where it is damaged."""
    yield from _rows(path, "Parquet", _parquet_batches(path))


def read_arrow(path: Path) -> Iterator[Row]:
    """Read the rows of an Arrow stream, as a data set saved by `datasets` holds them, or of an Arrow file.

    Raises RecordError, naming the file and the place, where it is damaged.
    """
    yield from _rows(path, "Arrow", _arrow_batches(path))


def _parquet_batches(path: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=_ROWS_PER_BATCH)


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    import pyarrow.ipc

    with pa.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pa.ipc.open_file(source)
            yield from (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            source.seek(0)
            yield from pa.ipc.open_stream(source)


def _rows(path: Path, kind: str, batches: Iterator[pa.RecordBatch]) -> Iterator[Row]:
    import pyarrow as pa

    number = 0
    try:
        for batch in batches:
            for first in range(0, len(batch), _ROWS_PER_BATCH):
                for row in _batch_rows(batch.slice(first, _ROWS_PER_BATCH)):
                    yield Row(f"row {number}", *row)
                    number += 1
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last of a damaged name
        after = f" after row {number - 1}" if number else ""
        raise RecordError(f"{path}: not a readable {kind} file{after}, truncated or corrupt ({error})") from error


def _batch_rows(batch: pa.RecordBatch) -> Iterator[tuple[Any, str]]:
    """Each row and "", or None and the reason why it cannot be read.

    Values are made only of what was checked: a damaged place of a text would otherwise lead anywhere in memory.
    """
    if not _fault(batch):
        yield from ((row, "") for row in batch.to_pylist())
        return
    for i in range(len(batch)):
        row = batch.slice(i, 1)
        fault = _fault(row)
        yield None if fault else row.to_pylist()[0], fault


def _fault(batch: pa.RecordBatch) -> str:
    """Say what is damaged in the values of some rows; empty if nothing is."""
    import pyarrow as pa

    try:
        batch.validate()
        for column in batch.columns:
            _check(column)
    except pa.ArrowInvalid as error:
        return f"a value is damaged, or a text is not UTF-8 ({error})"
    return ""


def _check(array: pa.Array) -> None:
    """Raise ArrowInvalid if a text or a place in the rows of an array is damaged, whatever lies around these rows.

    Arrow's own full check of a slice reads all that lists and structs hold, also of other rows.
    """
    import pyarrow as pa
    from pyarrow import types

    kind = array.type
    if not len(array):
        return
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        places = array.offsets.to_numpy()
        first, last = int(places[0]), int(places[-1])
        if first < 0 or last > len(array.values) or (places[1:] < places[:-1]).any():
            raise pa.ArrowInvalid("the places of a list lead out of its values")
        _check(array.values.slice(first, last - first))
    elif types.is_struct(kind):
        for child in array.flatten():
            _check(child)
    elif types.is_fixed_size_list(kind):
        _check(array.flatten())
    elif types.is_dictionary(kind):
        for index in set(array.indices.to_pylist()) - {None}:
            if not 0 <= index < len(array.dictionary):
                raise pa.ArrowInvalid(f"{index} is no index of a dictionary of {len(array.dictionary)} values")
            _check(array.dictionary.slice(index, 1))
    elif isinstance(array, pa.ExtensionArray):
        _check(array.storage)
    elif not types.is_primitive(kind):  # whose values may be anything
        array.validate(full=True)
