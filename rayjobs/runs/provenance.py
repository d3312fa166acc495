"""Refuse to mix results: lock what a folder's results were made from, and compare it with what is now given."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayjobs.errors import ProvenanceError
from rayjobs.storage.files import read_json, write_json

_UPLOAD_FOLDER = re.compile(r'/[^"]*/working_dir_files/_ray_pkg_[0-9a-f]+/')
SHOWN_CHARS = 60


def normalize_paths(settings: Any) -> Any:
    """Strip Ray's upload directory from paths, so that settings of two submissions of the same job compare equal.

    Ray unpacks a submitted working directory to a different path for each upload.
    """
    return json.loads(_UPLOAD_FOLDER.sub("", json.dumps(settings)))


def check_provenance(path: Path, identity: Mapping[str, Any], *, hint: str = "choose another run.name") -> None:
    """Compare `identity` with the one that is locked in the file `path`, if there is one.

    Raises ProvenanceError, which names each key that differs with its old and its new value, and ends with the hint.
    """
    if not path.exists():
        return
    locked, given = normalize_paths(read_json(path)), normalize_paths(dict(identity))
    if differing := [key for key in {**locked, **given} if locked.get(key) != given.get(key)]:
        changes = "; ".join(f"{key} was {_short(locked.get(key))}, now {_short(given.get(key))}" for key in differing)
        raise ProvenanceError(f"{path.parent} holds results of other settings ({changes}): {hint}")


def lock_provenance(path: Path, identity: Mapping[str, Any], *, hint: str = "choose another run.name") -> None:
    """Write `identity` to the file `path`, before the folder's first result. Raises ProvenanceError as above."""
    check_provenance(path, identity, hint=hint)
    write_json(path, dict(identity))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"
