"""Fingerprints: equal for equal content on every machine, different for any other."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from rayjobs.storage.fingerprint import file_fingerprint, file_fingerprints, fingerprint, remote_fingerprint


def test_a_value_keeps_its_fingerprint() -> None:
    """Folder names of trials and caches are made of it: a change makes every run start anew."""
    expected = hashlib.sha256(b'["\\u03b1", 0.1, {"a": null, "b": [1, true]}]').hexdigest()
    assert fingerprint(["α", 0.1, {"b": (1, True), "a": None}]) == expected
    assert fingerprint([1]) != fingerprint([1.0])
    with pytest.raises(TypeError):
        fingerprint([Path("a")])


def test_files_are_known_by_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"1")
    assert file_fingerprint(tmp_path / "a") == hashlib.sha256(b"1").hexdigest() == file_fingerprint(tmp_path / "b")
    assert file_fingerprints(tmp_path, ["b", "none"]) == {"b": hashlib.sha256(b"1").hexdigest(), "none": None}
    with pytest.raises(FileNotFoundError):
        file_fingerprint(tmp_path / "none")


@pytest.mark.parametrize("key", ["ETag", "etag"])
def test_an_etag_counts_and_not_the_path_or_time(key: str) -> None:
    one: dict[str, Any] = {"name": "bucket/a", key: '"1"', "size": 3, "LastModified": "2026-01-01"}
    other = {**one, "name": "bucket/b", "LastModified": "2026-02-02"}
    assert remote_fingerprint(one) == remote_fingerprint(other) != remote_fingerprint({**one, key: '"2"'})
    assert remote_fingerprint({"size": 3, "mtime": 1}) != remote_fingerprint({"size": 3, "mtime": 2})
