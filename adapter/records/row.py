"""One row of a file of records, before anything about it is checked but that it can be parsed."""

from typing import Any, NamedTuple


class Row(NamedTuple):
    """One row of a file, or the reason why it cannot be read."""

    location: str
    """ "item 3" of a JSON array, "line 3" of JSON lines or CSV, counted from 1; "row 3" of Parquet or Arrow, counted
    from 0."""
    value: Any
    error: str = ""


def rejected_record(place: str, reason: str) -> dict[str, Any]:
    """Stand-in for a record that cannot be used: its `place` in the file, and the reason under `rejected`."""
    return {"image": "", "place": place, "rejected": reason}
