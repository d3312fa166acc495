"""Read the rows of CSV and TSV files one by one: a header, then a record per row, all of whose values are text."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from adapter.errors import RecordError
from adapter.records.byte_stream import MAX_ROW_BYTES, kind_of, open_bytes, read_text_head
from adapter.records.row import Row

_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
"""A byte that is no UTF-8, as the error handler `surrogateescape` decodes it."""


def read_csv(path: Path) -> Iterator[Row]:
    """Read the rows below the header of a `.csv` or `.tsv` file in UTF-8. A field in quotes may hold ends of lines.

    A row with another number of fields than the header, or with a quote in the wrong place, costs that row. Raises
    RecordError, naming the file and the line, for a header that names no columns, or a quote without its end.
    """
    read_text_head(path)
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))  # of the whole process; by default 128 KiB
    delimiter = "\t" if kind_of(path) == ".tsv" else ","
    text = io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors="surrogateescape", newline="")
    with text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header = _read_header(path, reader)
        while True:
            location = f"line {reader.line_num + 1}"
            try:
                fields = next(reader, None)
            except csv.Error as error:
                if "unexpected end of data" in str(error):
                    raise RecordError(f"{path}, {location}: a quote without its end; is the file cut short?") from error
                yield Row(location, None, f"malformed row: {error}")
                continue
            if fields is None:
                return
            if fields:  # no blank line
                yield _row(location, header, fields)


def _read_header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise RecordError(f"{path}: malformed header: {error}") from error
    if not any(header):
        raise RecordError(f"{path}: the first line must name the columns")
    if len(header) == 1 and ";" in header[0]:
        raise RecordError(f"{path}: its columns are separated by ';'; save it with commas, or with tabs as .tsv")
    if double := sorted({name for name in header if header.count(name) > 1}):
        raise RecordError(f"{path}: the header names {', '.join(map(repr, double))} more than once")
    return header


def _row(location: str, header: list[str], fields: list[str]) -> Row:
    if len(fields) != len(header):
        return Row(location, None, f"the row has {len(fields)} fields, the header {len(header)}")
    if wrong := _ESCAPED_BYTE.search("".join(fields)):
        return Row(location, None, f"not UTF-8: byte {ord(wrong[0]) - 0xDC00:#04x}; save the file as UTF-8")
    return Row(location, dict(zip(header, fields, strict=True)))
