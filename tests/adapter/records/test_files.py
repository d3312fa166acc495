"""Files of records: read in bounded memory, and refused where an unknown part of them is missing."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adapter.errors import RecordError
from adapter.records import files as record_files
from adapter.records.files import read_rows

ROWS = [
    {"instruction": f"do\n{i} [", "input": "x" * (i % 7), "output": f'out {i} "q\\" é }}', "n": i} for i in range(57)
]
ONE = '[{"instruction": "i", "output": "o"}'
BOM = "\ufeff"


def values(path: Path) -> list[Any]:
    rows = list(read_rows(path))
    assert not any(row.error for row in rows)
    return [row.value for row in rows]


@pytest.mark.parametrize("read_bytes", [3, 50, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", ["", BOM])
def test_formats_agree_whatever_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int, indent: int | None, mark: str
) -> None:
    monkeypatch.setattr(record_files, "READ_BYTES", read_bytes)
    (tmp_path / "a.json").write_text(f"{mark} {json.dumps(ROWS, indent=indent)} \n")
    (tmp_path / "raw.json").write_text(mark + json.dumps(ROWS, indent=indent, ensure_ascii=False))
    (tmp_path / "a.jsonl").write_text(mark + "\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.json", "raw.json", "a.jsonl", "a.parquet"):
        assert values(tmp_path / name) == ROWS


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
        ("a.json", "", "expected a JSON array of records; the file is empty"),
        ("a.json", "\0\0\0\0", "the file is no JSON array"),
        ("a.json", "instruction,output", "the file is no JSON array"),
        ("a.json", '{"instruction": "i", "output": "o"}', "an object per line belongs in a .jsonl"),
        ("a.json", '{"a": [{}]}\n{"a": [{}]}\n', "an object per line belongs in a .jsonl"),
        ("a.json", '{"version": 1, "data": [{"instruction": "i"}]}', "one object, with a list under 'data': save that"),
        ("a.json", '{\n  "data": [\n    {"instruction": "i"}]}', "one object, with a list under 'data': save that"),
        ("a.json", '{\n"question": "i",\n"answer": "o"}', "the file is one object: put it into brackets"),
        ("a.jsonl", f"\n{ONE}]", r"a JSON array belongs in a \.json file: rename it"),
        ("a.json", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "a Git LFS pointer"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "a Git LFS pointer"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "a Git LFS pointer"),
        ("a.json", "\n<!DOCTYPE html><html>", "an HTML page"),
        ("a.parquet", "no parquet", "not a readable Parquet file"),
        ("a.csv", "", r"cannot read \.csv; use"),
    ],
)
def test_a_file_that_is_no_whole_list_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RecordError, match=message) as error:
        list(read_rows(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_named_with_the_way_out(tmp_path: Path, name: str, encoding: str) -> None:
    (tmp_path / name).write_text(ONE + "]", encoding=encoding)
    with pytest.raises(RecordError, match=r"UTF-16 or UTF-32, not UTF-8; save it as UTF-8, such as by `iconv"):
        list(read_rows(tmp_path / name))


def test_a_compressed_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(gzip.compress(b"[]"))
    with pytest.raises(RecordError, match=r"a\.json: compressed by gzip; unpack it first"):
        list(read_rows(tmp_path / "a.json"))


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"none\.json: no such file"):
        list(read_rows(tmp_path / "none.json"))
    with pytest.raises(RecordError, match="a folder; name a file of records, or read it as format scienceqa"):
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


def test_a_missing_bracket_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_files, "MAX_ITEM_BYTES", 100_000)
    (tmp_path / "a.json").write_text('[{"a": 1,' + ",".join(['{"b": 2}'] * 100_000) + "]")
    with pytest.raises(RecordError, match="item 1: malformed JSON: a bracket or quote is missing"):
        list(read_rows(tmp_path / "a.json"))


def test_reading_is_bounded_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    rows = json.dumps([{"instruction": str(i), "output": "o" * 1000} for i in range(20_000)])
    (tmp_path / "a.json").write_text(rows)
    size = len(rows)
    del rows
    tracemalloc.start()
    assert sum(1 for _ in read_rows(tmp_path / "a.json")) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 20
