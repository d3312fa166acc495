"""Records and images that a job sets aside: their list, and the share that it allows."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayjobs.errors import DataError
from rayjobs.runs.run_dir import REJECTED_FILE
from rayjobs.storage.credentials import mask_credentials
from rayjobs.storage.files import write_jsonl

SHOWN_REASONS = 3


def check_rejected_share(reasons: Sequence[str], total: int, allowed: float, setting: str, *, listed: str = "") -> None:
    """Raise DataError if the records that were set aside are more than a share of all, with the first of their reasons.

    Args:
        reasons: why each was set aside, naming it.
        allowed: the share, the value of the setting that is named.
        listed: the file that lists them all, if it is written already.
    """
    if len(reasons) <= allowed * total:
        return
    first = "; ".join(reasons[:SHOWN_REASONS])
    more = f"; all of them: {listed}" if listed else ""
    raise DataError(f"{len(reasons)} of {total} records cannot be used, over {setting}={allowed:g}: {first}{more}")


def write_rejected(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the records or images that a job could not use into its folder, with credentials masked."""
    write_jsonl(folder / REJECTED_FILE, map(mask_credentials, rows))
