"""Stop if more records were set aside than a job allows."""

from collections.abc import Sequence

from rayjobs.errors import DataError

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
