"""Ranges of a file, at a path and at a URL: the bytes that a slice has, each byte read once."""

from pathlib import Path

import numpy as np
import pytest

from rayjobs.storage.counted_reader import CountedReader
from rayjobs.storage.files import write_bytes


@pytest.mark.parametrize("where", ["", "memory:/"])
def test_ranges_are_slices_and_each_byte_is_read_once(tmp_path: Path, where: str) -> None:
    rng, content = np.random.default_rng(0), np.random.default_rng(1).bytes(101)
    write_bytes(f"{where}{tmp_path}/a", content)
    for count in [0, 1, 2, 5, 17] * 4:
        starts = rng.integers(0, 90, count).tolist()
        ranges = [(start, int(rng.integers(start + 1, 102))) for start in starts]
        reader = CountedReader()
        assert reader.read_ranges(f"{where}{tmp_path}/a", ranges) == [content[start:stop] for start, stop in ranges]
        assert reader.bytes == len({place for start, stop in ranges for place in range(start, stop)})
    reader = CountedReader()
    assert reader.read(f"{where}{tmp_path}/a") == content
    assert reader.bytes == 101
    with pytest.raises(ValueError, match=r"a was cut short: it ends at byte 101, where 102 are expected"):
        reader.read_ranges(f"{where}{tmp_path}/a", [(90, 102)])
