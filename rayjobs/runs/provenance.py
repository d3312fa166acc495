"""Refuse to mix results: lock what a folder's results were made from, and compare it with what is now given."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rayjobs.cluster.ray_workarounds import remove_upload_folder
from rayjobs.config_fields import MISSING, field_default, field_type
from rayjobs.errors import ProvenanceError
from rayjobs.storage.credentials import mask_credentials
from rayjobs.storage.files import read_object, write_json

SHOWN_CHARS = 60


class Change(NamedTuple):
    """One value that differs from the one that results were made from."""

    key: str
    """The dotted key; items of a list are `key[0]`."""
    before: Any
    """MISSING if the value was not recorded and has no default."""
    now: Any
    """MISSING if this version has no such key."""

    def __str__(self) -> str:
        if self.before is MISSING:
            return f"{self.key} was not recorded, now {_short(self.now)}"
        now = "unknown to this version" if self.now is MISSING else f"now {_short(self.now)}"
        return f"{self.key} was {_short(self.before)}, {now}"


def find_changes(before: Any, now: Any, kind: Any = Any, key: str = "") -> Iterator[Change]:
    """Yield the values that differ between two sets of plain values, down to single keys of nested mappings and lists.

    kind: the config or the annotation that the values belong to. A key that `before` lacks counts as that config's
    default, so that settings which a later release adds do not differ as long as nobody sets them.
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in {**before, **now}:
            old = before[name] if name in before else field_default(kind, name)
            new = now.get(name, MISSING)
            yield from find_changes(old, new, field_type(kind, [name]), f"{key}.{name}" if key else name)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for position, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from find_changes(old, new, field_type(kind, [position]), f"{key}[{position}]")
    elif before != now:
        yield Change(key, before, now)


def comparable(values: Any) -> Any:
    """Plain values as they are written and compared: without credentials of URLs and without Ray's upload folder."""
    return json.loads(remove_upload_folder(json.dumps(mask_credentials(values))))


def check_provenance(
    path: Path, identity: Mapping[str, Any], *, hint: str = "choose another run.name", kind: Any = Any
) -> None:
    """Compare `identity` with the one that is locked in the file `path`, if there is one.

    kind: the config class whose defaults hold for keys that the file lacks; see `find_changes`.

    Raises ProvenanceError, which names each key that differs with its old and its new value, and ends with the hint.
    """
    if not path.exists():
        return
    refuse_changes(
        path.parent, list(find_changes(comparable(read_object(path)), comparable(dict(identity)), kind)), hint
    )


def refuse_changes(folder: Path, changes: list[Change], hint: str) -> None:
    """Raise ProvenanceError, which names the changes, unless there are none."""
    if changes:
        raise ProvenanceError(f"{folder} holds results of other settings ({'; '.join(map(str, changes))}): {hint}")


def lock_provenance(
    path: Path, identity: Mapping[str, Any], *, hint: str = "choose another run.name", kind: Any = Any
) -> None:
    """Write `identity` to the file `path`, before the folder's first result. Raises ProvenanceError as above."""
    check_provenance(path, identity, hint=hint, kind=kind)
    write_json(path, mask_credentials(dict(identity)))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"
