"""Files of records: read in bounded memory, and refused where an unknown part of them is missing."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from adapter.errors import RecordError
from adapter.records import json_file
from adapter.records.files import is_record_file, read_rows

ROWS = [
    {"instruction": f"do\n{i} [", "input": "x" * (i % 7), "output": f'out {i} "q\\" é }}', "n": i} for i in range(57)
]
ONE = '[{"instruction": "i", "output": "o"}'
BOM = "\ufeff"


def values(path: Path) -> list[Any]:
    rows = list(read_rows(path))
    assert not any(row.error for row in rows)
    return [row.value for row in rows]


def write_arrow(path: Path, writer: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist(ROWS)
    with writer(str(path), table.schema) as file:
        file.write_table(table, max_chunksize=19)


@pytest.mark.parametrize("read_bytes", [3, 50, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", ["", BOM])
def test_formats_agree_whatever_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int, indent: int | None, mark: str
) -> None:
    monkeypatch.setattr(json_file, "READ_BYTES", read_bytes)
    (tmp_path / "a.json").write_text(f"{mark} {json.dumps(ROWS, indent=indent)} \n")
    (tmp_path / "raw.json").write_text(mark + json.dumps(ROWS, indent=indent, ensure_ascii=False))
    (tmp_path / "a.jsonl").write_text(mark + "\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    (tmp_path / "lines.json").write_text((tmp_path / "a.jsonl").read_text())
    for name in ("a.json", "a.jsonl"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        (tmp_path / f"{name}.zst").write_bytes(zstandard.compress((tmp_path / name).read_bytes()))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    write_arrow(tmp_path / "a.arrow", pa.ipc.new_stream)
    write_arrow(tmp_path / "file.arrow", pa.ipc.new_file)
    written = sorted(tmp_path.iterdir())
    assert len(written) == 11
    for path in written:
        assert values(path) == ROWS
        assert is_record_file(path)


@pytest.mark.parametrize(
    "text", ["[]", " [ ] ", "[1]", '["]"]', '["a\\\\", "\\"["]', "[[], {}]", '[null, 1.5e3, "", true]']
)
def test_an_array_is_what_pythons_own_parser_reads(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert values(tmp_path / "a.json") == json.loads(text)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_on_any_system(tmp_path: Path, end: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(end.join(['{"a": "x\u2028y"}', "", BOM + '{"a": 2}', '{"a"']).encode())
    first, second, cut = read_rows(tmp_path / "a.jsonl")
    assert first[:2] == ("line 1", {"a": "x\u2028y"})
    assert second[:2] == ("line 3", {"a": 2})
    assert (cut.location, cut.error) == (
        "line 4",
        "malformed JSON: Expecting ':' delimiter: line 1 column 5 (char 4); it begins with '{\"a\"'",
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", ONE + "\n\n", "item 1: malformed JSON: the file ends within it; is it cut short"),
        ("a.json", ONE + ',\n{"instruction": "i"', "item 2: malformed JSON: the file ends within it"),
        ("a.json", ONE + ',\n{"instruction": "i', "item 2: malformed JSON: the file ends within it"),
        ("a.json", ONE + ",", "item 2: malformed JSON: the file ends within it"),
        ("a.json", ONE + "}", "item 1: malformed JSON: a bracket is missing"),
        ("a.json", '[{"a": 1, {"b": 2}]', "item 1: malformed JSON: the file ends within it"),
        ("a.json", ONE + "]\n[]", "ends after item 1, but the file goes on"),
        ("a.json", ONE + "]\n" + ONE + "]", "ends after item 1, but the file goes on"),
        ("a.json", ONE + "] and more", "ends after item 1, but the file goes on"),
        ("a.json", ONE + "]" + " " * 99_999 + BOM, "ends after item 1, but the file goes on"),
        ("a.json", " []]", "ends after item 0, but the file goes on"),
        ("a.json", "", "the file is empty"),
        ("a.jsonl", "", "the file is empty"),
        ("a.csv", "", "the file is empty"),
        ("a.parquet", "", "the file is empty"),
        ("a.json", " \n", "one object per line; the file is empty"),
        ("a.json", "\0\0\0\0", "expected a JSON array of records, or one object per line; the file is neither"),
        ("a.json", "instruction,output", "one object per line; the file is neither"),
        ("a.json", '{"version": 1, "data": [{"instruction": "i"}]}', "one object, with a list under 'data': save that"),
        ("a.json", '{\n  "data": [\n    {"instruction": "i"}]}', "one object, with a list under 'data': save that"),
        ("a.json", '{\n"question": "i",\n"answer": "o"}', "the file is one object: put it into brackets"),
        ("a.jsonl", f"\n{ONE}", "item 1: malformed JSON: the file ends within it"),
        ("a.json", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "a Git LFS pointer"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "a Git LFS pointer"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "a Git LFS pointer"),
        ("a.json", "\n<!DOCTYPE html><html>", "an HTML page"),
        ("a.parquet", "no parquet", "not a readable Parquet file"),
        ("a.arrow", "no arrow", "not a readable Arrow file"),
        ("a.csv", "\ni,o", "the first line must name the columns"),
        ("a.csv", "i;o\na;b", "its columns are separated by ';'"),
        ("a.csv", "i,o,i\na,b,c", "the header names 'i' more than once"),
        ("a.csv", 'i,o\na,b\n"c,d\ne,f\n', "line 3: a quote without its end"),
        ("a.txt", "text", r"cannot read \.txt; use .json, "),
        ("a.parquet.gz", "text", r"cannot read \.gz; use .json, "),
    ],
)
def test_a_file_that_is_no_whole_list_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RecordError, match=message) as error:
        list(read_rows(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.jsonl.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_named_with_the_way_out(tmp_path: Path, name: str, encoding: str) -> None:
    text = (ONE + "]").encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    with pytest.raises(RecordError, match=r"UTF-16 or UTF-32, not UTF-8; save it as UTF-8, such as by `iconv"):
        list(read_rows(tmp_path / name))


GZIP, ZSTANDARD = (pack("\n".join(map(json.dumps, ROWS)).encode()) for pack in (gzip.compress, zstandard.compress))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GZIP, "compressed by gzip; unpack it, or let its name end in .gz"),
        ("a.jsonl", ZSTANDARD, "compressed by Zstandard; unpack it, or let its name end in .zst"),
        ("a.jsonl.gz", ZSTANDARD, "compressed by Zstandard; unpack it, or let its name end in .zst"),
        ("a.jsonl.gz", b"{}", "not compressed by gzip, as .gz says"),
        ("a.jsonl.zst", b"{}", "not compressed by Zstandard, as .zst says"),
        ("a.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("a.jsonl.gz", b"", "the file is empty"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), ""),
        ("a.jsonl.gz", GZIP[:-9], r"cannot be read.*, truncated or corrupt \(.*[Tt]runcated"),
        ("a.jsonl.zst", ZSTANDARD[:-9], r"cannot be read.*, truncated or corrupt \(.*[Tt]runcated"),
        ("a.csv.zst", ZSTANDARD[:-9], r"cannot be read.*, truncated or corrupt \(.*[Tt]runcated"),
        ("a.json.gz", GZIP[:300] + b"no" + GZIP[302:], "cannot be read.*, truncated or corrupt"),
    ],
)
def test_compressed_files_that_are_not_what_they_say(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    if not message:
        assert values(tmp_path / name) == []
        return
    with pytest.raises(RecordError, match=message) as error:
        list(read_rows(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("mark", ["", BOM])
@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("A.CSV", ",")])
def test_csv_is_what_pythons_own_writer_wrote(tmp_path: Path, mark: str, name: str, delimiter: str) -> None:
    rows = [{column: str(value) for column, value in row.items()} for row in ROWS]
    rows[5]["output"] = 'a "quote",\ttab\r\nand\n\nlines ' + "x" * 200_000
    with (tmp_path / name).open("w", newline="") as file:
        file.write(mark)
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    assert values(tmp_path / name) == rows


def test_a_bad_row_of_csv_costs_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'i, o\n"two\nlines",b\nc\n\n"d" x,e\nf,\xe9\ng,h')
    assert list(read_rows(tmp_path / "a.csv")) == [
        ("line 2", {"i": "two\nlines", "o": "b"}, ""),
        ("line 4", None, "the row has 1 fields, the header 2"),
        ("line 6", None, "malformed row: ',' expected after '\"'"),
        ("line 7", None, "not UTF-8: byte 0xe9; save the file as UTF-8"),
        ("line 8", {"i": "g", "o": "h"}, ""),
    ]


def test_a_line_without_an_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_file, "MAX_ROW_BYTES", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n"' + b"x" * 2000))
    with pytest.raises(RecordError, match="line 2: longer than 1,000 bytes"):
        list(read_rows(tmp_path / "a.jsonl.gz"))


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"none\.json: no such file"):
        list(read_rows(tmp_path / "none.json"))
    with pytest.raises(RecordError, match="a folder; name a file of records"):
        list(read_rows(tmp_path))


def test_a_parquet_file_that_was_cut_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.Table.from_pylist(ROWS * 100), path, row_group_size=1900, use_dictionary=False, compression="gzip"
    )
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(RecordError, match=r"a\.parquet: not a readable Parquet file, truncated or corrupt"):
        list(read_rows(path))
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(3000) + whole[middle + 3000 :])
    with pytest.raises(RecordError, match=r"a\.parquet: not a readable Parquet file.*, truncated or corrupt"):
        list(read_rows(path))


def test_an_arrow_file_that_was_cut(tmp_path: Path) -> None:
    write_arrow(tmp_path / "a.arrow", pa.ipc.new_stream)
    whole = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(whole[: len(whole) // 2 + 5])
    with pytest.raises(RecordError, match=r"a\.arrow: not a readable Arrow file after row \d+, truncated or corrupt"):
        list(read_rows(tmp_path / "a.arrow"))


def test_a_missing_bracket_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_file, "MAX_ROW_BYTES", 100_000)
    (tmp_path / "a.json").write_text('[{"a": 1,' + ",".join(['{"b": 2}'] * 100_000) + "]")
    with pytest.raises(RecordError, match="item 1: malformed JSON: a bracket or quote is missing"):
        list(read_rows(tmp_path / "a.json"))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.csv", "a.arrow"])
def test_reading_is_bounded_in_memory(tmp_path: Path, name: str) -> None:
    import tracemalloc

    rows = [{"instruction": str(i), "output": "o" * 1000} for i in range(20_000)]
    size = len(json.dumps(rows))
    if name == "a.json":
        (tmp_path / name).write_text(json.dumps(rows))
    elif name == "a.csv":
        (tmp_path / name).write_text("\n".join(["instruction,output", *(",".join(row.values()) for row in rows)]))
    elif name == "a.arrow":
        with pa.ipc.new_stream(str(tmp_path / name), pa.Table.from_pylist(rows).schema) as file:
            file.write_table(pa.Table.from_pylist(rows))
    else:
        (tmp_path / name).write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode(), compresslevel=1))
    del rows
    tracemalloc.start()
    assert sum(1 for _ in read_rows(tmp_path / name)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 20
