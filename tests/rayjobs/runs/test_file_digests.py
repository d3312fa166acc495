"""A finished run's files are known by their digests: one that has changed or is lost is named."""

import hashlib
import json
from pathlib import Path

import pytest
import s3fs

from rayjobs.errors import DataError
from rayjobs.runs.file_digests import DIGESTS_FILE, changed_files, write_digests
from rayjobs.storage.paths import resolve_path

OWN = {"result.json": b"{}", "chosen/cache.safetensors": b"\0\1", "train/checkpoint_1/state.safetensors": b"state"}
OTHERS = {"run.json": b"{}", "report.html": b"", "README.md": b"", ".seen-x": b"", "a/.seen": b"", "b/run.json": b"{}"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with files of its own, others that are written again, and a run within it."""
    for name, content in {**OWN, **OTHERS, "b/result.json": b"{}"}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path


def test_the_digests_are_the_sha_256_of_the_runs_own_files(run: Path) -> None:
    write_digests(run)
    expected = {name: hashlib.sha256(content).hexdigest() for name, content in OWN.items()}
    assert json.loads((run / DIGESTS_FILE).read_text()) == expected
    assert changed_files(run) == (3, [])
    (run / "report.html").write_text("written again")
    (run / "added.txt").write_text("later, by another command")
    assert changed_files(run) == (3, [])


def test_a_flipped_byte_and_a_missing_file_are_named(run: Path) -> None:
    write_digests(run)
    (run / "chosen" / "cache.safetensors").write_bytes(b"\0\3")
    (run / "result.json").unlink()
    assert sorted(changed_files(run)[1]) == [
        "chosen/cache.safetensors: its bytes have changed since the run ended",
        "result.json: cannot be read",
    ]


@pytest.mark.parametrize(
    ("content", "told"), [(None, "did not write digests"), ("[1]", "is not a list"), ("{", "malformed")]
)
def test_a_run_without_usable_digests_is_told(run: Path, content: str | None, told: str) -> None:
    if content:
        (run / DIGESTS_FILE).write_text(content)
    with pytest.raises(DataError, match=told):
        changed_files(run)


def test_in_a_bucket_a_changed_file_is_named_too(run: Path, s3: str) -> None:
    s3fs.S3FileSystem().put(str(run), f"{s3}/digests", recursive=True)
    folder = resolve_path(f"{s3}/digests")
    write_digests(folder)
    assert set(json.loads((folder / DIGESTS_FILE).read_text())) == set(OWN)
    assert changed_files(folder) == (3, [])
    (folder / "chosen" / "cache.safetensors").write_bytes(b"\0\3")
    assert changed_files(folder) == (3, ["chosen/cache.safetensors: its bytes have changed since the run ended"])
