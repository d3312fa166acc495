"""What is written to disk: Arrow schemas, Parquet and JSON files that are whole or absent, never half there."""

import json
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayjobs.errors import UserError
from rayjobs.storage.paths import is_url, resolve_path, upload_file


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; renamed into place if the block succeeds, removed if it does not.

    For a URL it is a local path, and the file is put there at once.
    """
    path = resolve_path(path)
    if is_url(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
            upload_file(Path(folder) / path.name, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Raises ValueError naming the file if it is no JSON."""
    return _parsed(resolve_path(path).read_bytes(), path)


def _parsed(text: bytes, path: str | Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: malformed JSON: {error}") from error


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: str | Path, *, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """A JSONL file's rows, or the whole ones among its last bytes; a last line cut short by a crash is left out.

    Raises ValueError naming the file if another line is no JSON.
    """
    with resolve_path(path).open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - last_bytes) if last_bytes else 0
        file.seek(start)
        lines = file.read().split(b"\n")
    return [_parsed(line, path) for line in lines[1 if start else 0 : -1] if line]


def write_parquet(path: str | Path, table: pa.Table, schema: pa.Schema | None = None) -> None:
    """Writes a table. Raises pyarrow.ArrowInvalid if it does not fit the schema."""
    with atomic_path(path) as temporary:
        pq.write_table(table if schema is None else table.cast(schema), temporary)


def read_parquet(path: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    found: Any = resolve_path(path)
    if is_url(found):
        return pq.read_table(found.path, filesystem=found.fs, columns=columns)
    return pq.read_table(found, columns=columns)
