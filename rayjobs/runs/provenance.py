"""Where a folder's answers come from: noted before the first of them is written, compared before there are more."""

from rayjobs.errors import UserError
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from rayjobs.storage.files import read_json, write_json


_UPLOADED = re.compile(r'/[^"]*/working_dir_files/_ray_pkg_[0-9a-f]+/')


def normalize_paths(settings: Any) -> Any:
    """Settings, to be compared with those of another start: what a submitted job's folder holds lies, each time that
    it is uploaded, somewhere else, and goes by its name within that folder."""
    return json.loads(_UPLOADED.sub("", json.dumps(settings)))


def check_provenance(path: Path, identity: Mapping[str, Any], *, way_out: str = "choose another run.name") -> None:
    """Raises ValueError if the folder's answers came from other settings, naming those that differ."""
    if not path.exists():
        return
    before, identity = normalize_paths(read_json(path)), normalize_paths(dict(identity))
    if differing := [name for name in {**before, **identity} if before.get(name) != identity.get(name)]:
        told = "; ".join(f"{name} was {before.get(name)!s:.60}, now {identity.get(name)!s:.60}" for name in differing)
        raise UserError(f"{path.parent} holds answers from other settings ({told}): {way_out}")


def lock_provenance(path: Path, identity: Mapping[str, Any], **told: str) -> None:
    """Notes where the folder's answers come from, before the first of them is written."""
    check_provenance(path, identity, **told)
    write_json(path, dict(identity))
