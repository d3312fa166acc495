"""Parts of a token store: single records are read as they were written, at a path and at a URL."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapter.records.example import count_labels
from rayjobs.data.token_part import read_index, read_records, write_part
from rayjobs.storage.counted_reader import CountedReader


def make_records(first: int, count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(first)
    records = []
    for id in range(first, first + count):
        tokens = rng.integers(0, 2**31, int(rng.integers(1, 30))).tolist()
        spans = [[0, 1], [len(tokens) - 1, len(tokens)]][: int(rng.integers(0, 3))]
        records.append({"id": id, "tokens": tokens, "label_spans": spans, "image": id % 7 if id % 3 else None})
    return records


@pytest.mark.parametrize("where", ["", "memory:/"])
def test_records_are_read_as_they_were_written_in_any_order(tmp_path: Path, where: str) -> None:
    folder, parts = f"{where}{tmp_path}", [make_records(5, 23), make_records(1 << 41, 11)]
    for number, records in enumerate(parts):
        write_part(f"{folder}/{number}.parquet", records)
    reader = CountedReader()
    index, written = read_index(folder, ["0.parquet", "1.parquet"], reader), parts[0] + parts[1]
    assert index.table["tokens"].to_pylist() == [len(record["tokens"]) for record in written]
    assert index.table["labels"].to_pylist() == [count_labels(record["label_spans"]) for record in written]
    index_bytes = reader.bytes
    for places in (list(range(34)), [33, 0, 21, 21, 22, 4], []):
        read = read_records(index.take(np.array(places, np.int64)), reader)
        assert read == [written[place] for place in places]
    sizes = [4 * (len(record["tokens"]) + 2 * len(record["label_spans"])) for record in written]
    assert reader.bytes == index_bytes + sum(sizes) + sum(sizes[place] for place in {33, 0, 21, 22, 4})


def test_damaged_files_are_named_with_the_way_out(tmp_path: Path) -> None:
    write_part(f"{tmp_path}/a.parquet", make_records(0, 9))
    reader = CountedReader()
    index = read_index(str(tmp_path), ["a.parquet"], reader)
    values = tmp_path / "a.bin"
    values.write_bytes(values.read_bytes()[:-4])
    assert len(read_records(index.take(np.arange(8)), reader)) == 8
    with pytest.raises(ValueError, match=rf"a\.bin was cut short.*delete the folder {tmp_path}, and the next run"):
        read_records(index, reader)
    path = tmp_path / "a.parquet"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=rf"a\.parquet is damaged.*delete the folder {tmp_path}, and the next run"):
        read_index(str(tmp_path), ["a.parquet"], reader)
    path.unlink()
    with pytest.raises(OSError, match=r"a\.parquet cannot be read"):
        read_index(str(tmp_path), ["a.parquet"], reader)
