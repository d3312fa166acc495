"""The digests of the files of a finished run, by which a file that has changed or is lost is noticed."""

from pathlib import Path
from typing import Any

from rayjobs.errors import DataError
from rayjobs.runs.record import RECORD_FILE, REPORT_FILE
from rayjobs.storage.files import read_json, write_json
from rayjobs.storage.fingerprint import file_fingerprints
from rayjobs.storage.paths import inside, is_url

DIGESTS_FILE = "files.json"
"""{file, relative to the run folder: its fingerprint}; in a bucket that is the store's own (its ETag)."""
REWRITTEN = (DIGESTS_FILE, RECORD_FILE, REPORT_FILE, "README.md")
"""Files that are written after the digests, or again by other commands."""


def write_digests(folder: Path) -> None:
    """Write the digests of all files of a run that has just ended; runs within its folder have their own."""
    write_json(folder / DIGESTS_FILE, file_fingerprints(folder, _names(folder)))


def changed_files(folder: Path) -> tuple[int, list[str]]:
    """Return how many files of a finished run have digests, and a line for each that is missing or has changed.

    Raises DataError if the run has no digests.
    """
    path = folder / DIGESTS_FILE
    if not path.is_file():
        raise DataError(
            f"{folder} has no {DIGESTS_FILE}: the version that finished it did not write digests of its files"
        )
    written: dict[str, str] = read_json(path)
    if not isinstance(written, dict):
        raise DataError(f"{path} is not a list of digests by file")
    for name in written:
        inside(folder, name)
    present = file_fingerprints(folder, written)
    lines = [
        f"{name}: {'cannot be read' if present[name] is None else 'its bytes have changed since the run ended'}"
        for name, digest in written.items()
        if present[name] != digest
    ]
    return len(written), lines


def _names(folder: Path) -> list[str]:
    """Return the paths of a run's files relative to its folder, without those of runs within it and hidden ones."""
    root: Any = folder
    if is_url(folder):
        prefix = root.path.rstrip("/") + "/"
        found = [name.removeprefix(prefix) for name in root.fs.find(root.path)]
    else:
        found = [path.relative_to(folder).as_posix() for path in root.rglob("*") if path.is_file()]
    inner = tuple(name.removesuffix(RECORD_FILE) for name in found if name.endswith(f"/{RECORD_FILE}"))
    return sorted(
        name for name in found if name not in REWRITTEN and not name.startswith(inner) and "/." not in f"/{name}"
    )
