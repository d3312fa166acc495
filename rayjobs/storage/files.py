"""Read and write JSON, JSONL and Parquet files, local or at a URL; a file is written whole or not at all."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from adapter import atomic_file
from adapter.json_object import parse_json
from rayjobs.errors import USER_ERRORS, DataError, StorageError
from rayjobs.storage.lease import check_lease
from rayjobs.storage.paths import is_url, make_folder, read_bytes, resolve_path, upload_file

if TYPE_CHECKING:
    import pyarrow as pa
    from pydantic import TypeAdapter

T = TypeVar("T")


@contextmanager
def _as_storage_error(path: str | Path, action: str) -> Iterator[None]:
    """Turn an OSError that does not name what is wrong by its class, such as a full disk's, into a StorageError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, USER_ERRORS):
            raise
        raise StorageError(f"{path} cannot be {action}: {error.strerror or error}") from error


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary local path; it becomes `path` if the block succeeds and is removed if the block fails.

    For a URL, the finished file is uploaded in one request. Raises StorageError, for instance for a full disk, and
    LeaseLostError in a run folder that another driver has taken over.
    """
    path = resolve_path(path)
    if not is_url(path):
        make_folder(path.parent)
        with _as_storage_error(path, "written"), atomic_file.atomic_path(path) as temporary:
            yield temporary
            check_lease(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / path.name
        check_lease(path)
        upload_file(Path(folder) / path.name, path)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary local folder to fill; it becomes `folder` if the block succeeds and is removed if it fails.

    If another process has made `folder` in the meantime, its folder stays.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    make_folder(temporary)
    try:
        yield temporary
        if not folder.exists():
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: str | Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path, *, way_out: str = "") -> Any:
    """The value of a JSON file. Raises DataError, which names the file and ends with the way out, and OSError."""
    with _as_storage_error(path, "read"):
        text = read_bytes(path)
    return _parse_json(text, path, way_out)


def read_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises DataError, which names the file, for one that holds something else; OSError."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise DataError(
            f"{path} holds a {type(values).__name__} where an object belongs, so it is damaged or replaced: delete it, "
            "and start the job again that writes it"
        )
    return values


def read_typed(path: str | Path, kind: TypeAdapter[T], what: str, *, way_out: str = "") -> T:
    """The value of a JSON file as an object of a class.

    Raises DataError, which says that the file is not `what` and names the first wrong field, and OSError.
    """
    from pydantic import ValidationError

    try:
        return kind.validate_python(read_json(path, way_out=way_out))
    except ValidationError as error:
        first = error.errors()[0]
        field = "".join(f"{part}: " for part in first["loc"])
        raise DataError(f"{path} is not {what}: {field}{first['msg']}{way_out}") from error


def _parse_json(text: bytes, path: str | Path, way_out: str = "") -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{path}: malformed JSON: {error}{way_out}") from error


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: str | Path, *, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The rows of a JSONL file, or those that lie whole within its last bytes.

    A last line without an end is left out: a crash cut it short. Raises DataError if another line is malformed.
    """
    with _as_storage_error(path, "read"), _open(path) as file:
        start = max(0, file.seek(0, os.SEEK_END) - last_bytes) if last_bytes else 0
        file.seek(start)
        lines = file.read().split(b"\n")
    return [_parse_json(line, path) for line in lines[1 if start else 0 : -1] if line]


def _open(path: str | Path) -> BinaryIO:
    """Open a file, at a URL one that is read already: a run sends its growing files again and again."""
    return io.BytesIO(read_bytes(path)) if is_url(path) else resolve_path(path).open("rb")


def write_parquet(path: str | Path, table: pa.Table, schema: pa.Schema | None = None) -> None:
    """Write a table, cast to the schema if there is one. Raises pyarrow.ArrowInvalid if it does not fit the schema."""
    import pyarrow.parquet as pq

    with atomic_path(path) as temporary:
        pq.write_table(table if schema is None else table.cast(schema), temporary)


def write_index(path: str | Path, table: pa.Table) -> None:
    """Write a table of integers as a Parquet file of few bytes a row: each value as its difference from the last."""
    import pyarrow.parquet as pq

    encoding = dict.fromkeys(table.column_names, "DELTA_BINARY_PACKED")
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, use_dictionary=False, column_encoding=encoding, write_statistics=False)


def parse_index(content: bytes, path: str | Path) -> pa.Table:
    """Return the table of a file that `write_index` wrote. Raises DataError if the file is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with whole_index(path):
        return pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)


@contextmanager
def whole_index(path: str | Path) -> Iterator[None]:
    """Turn what a damaged index raises where it is read, or where it lacks a column or a value, into a DataError."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is damaged ({error}); delete the folder {str(path).rpartition('/')[0]}, and the next run makes "
            "it again"
        ) from error


def values_path(index: str) -> str:
    """Return the path of the file of values that an index, `NAME.parquet`, belongs to: `NAME.bin`."""
    return f"{index.removesuffix('.parquet')}.bin"


def read_parquet(path: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The table of a Parquet file, or its named columns. Raises DataError for a damaged file, and OSError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    resolved: Any = resolve_path(path)
    try:
        with _as_storage_error(path, "read"):
            if is_url(resolved):
                table = pq.read_table(resolved.path, filesystem=resolved.fs, columns=columns)
            else:
                table = pq.read_table(resolved, columns=columns)
        table.validate(full=True)  # a text that is not UTF-8 would be met much later
        return table
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the latter of a damaged name
        raise DataError(f"{path} is no whole Parquet file ({' '.join(str(error).split())})") from error
