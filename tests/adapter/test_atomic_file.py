"""Files are written whole or not at all, with the mode of any other new file."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapter.atomic_file import atomic_path


def test_a_file_is_whole_or_absent_and_the_group_can_read_it(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "new" / "a.safetensors") as temporary:
            save_file({"a": torch.zeros(1)}, temporary)
            assert not (tmp_path / "new" / "a.safetensors").exists()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "a.safetensors").stat().st_mode) == 0o640


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def fail() -> None:
        with atomic_path(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]
