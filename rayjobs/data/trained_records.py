"""Tell records that were trained on from all others: the held-out share of a source, and a digest of each record."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rayjobs.data.records import RecordsConfig, Source
from rayjobs.errors import DataError
from rayjobs.storage.files import read_json, write_json

_NOT_CONTENT = ("place", "notes", "group")
"""Keys of a record that say where it stands, or follow from its other keys."""


def is_held_out(record: Mapping[str, Any], fraction: float) -> bool:
    """Return whether a record is held out for validation, by a hash of its conversation, image or content.

    So a record and its duplicates, and all records about one image, are on the same side wherever they stand.
    """
    group = record.get("group") or record["image"]
    content = group or "\0".join(record[name] for name in ("instruction", "input", "output"))
    digest = hashlib.sha256(content.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def record_digest(record: Mapping[str, Any]) -> int:
    """Return 64 bits of a hash of all that a record says, its image by path; equal records have equal digests."""
    content = {key: value for key, value in record.items() if key not in _NOT_CONTENT}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big", signed=True)


def trained_digests(records: RecordsConfig) -> set[int]:
    """Return the digests of the records that a run with these settings trains on.

    Raises what `Source.read` raises if the files are not there.
    """
    return {
        record_digest(record)
        for source in records.sources()
        for record in source.read()
        if "rejected" not in record and not is_held_out(record, records.held_out_fraction)
    }


def held_out_records(records: RecordsConfig) -> Iterator[dict[str, Any]]:
    """Yield the usable records that a run with these settings keeps for validation, in order."""
    for source in records.all_sources():
        yield from held_out_of(source, records.held_out_fraction)


def held_out_of(source: Source, fraction: float) -> Iterator[dict[str, Any]]:
    """Yield the usable records of one source that are kept for validation, in order: all of one that is for it."""
    for record in source.read():
        if "rejected" not in record and (source.role == "val" or is_held_out(record, fraction)):
            yield record


def write_digests(path: str | Path, digests: set[int]) -> None:
    """Write digests, sorted, so that equal records give equal files."""
    write_json(path, sorted(digests))


def read_digests(path: str | Path) -> set[int]:
    """Read what `write_digests` wrote. Raises DataError for a damaged file."""
    digests = read_json(path)
    if not isinstance(digests, list) or not all(isinstance(digest, int) for digest in digests):
        raise DataError(f"{path}: expected a list of numbers, got {digests!r:.60}")
    return set(digests)
