"""The configs that come with this package: found by name, listed and copied."""

import difflib
import shutil
from pathlib import Path
from typing import NamedTuple

from rayjobs.errors import ConfigError

FOLDER = Path(__file__).parent / "configs"


class ShippedConfig(NamedTuple):
    """A config of this package."""

    name: str
    """The name that `--config` takes: that of its file, without folder and ending."""
    job: str
    """The job that it is for."""
    summary: str
    """The first sentence of its comment."""
    path: Path


def list_configs() -> list[ShippedConfig]:
    """List the configs for jobs, by job and name."""
    configs = [_read_header(path) for path in sorted(FOLDER.glob("*/*.yaml")) if path.parent.name != "cluster"]
    return sorted(configs, key=lambda config: (config.job, config.name))


def find_config(name: str | Path) -> Path:
    """Return the file that `--config` names: a file that exists, or else the config of this package with that name.

    Raises ConfigError, with the closest name, for a name that is neither.
    """
    if (path := Path(name)).exists() or is_path(name):
        return path
    return _shipped_path(str(name), "neither a file nor a config of this package")


def is_shipped(name: str) -> bool:
    """True for the name of a config of this package, unless a file of that name lies in the current folder."""
    return not is_path(name) and not Path(name).exists() and any(config.name == name for config in list_configs())


def is_path(name: str | Path) -> bool:
    """True for what can only be a file: it has a folder or an ending."""
    return isinstance(name, Path) or "/" in name or name.endswith((".yaml", ".yml", ".json"))


def copy_config(name: str, to: Path) -> Path:
    """Copy a config of this package to a file, or into a folder that exists, and return the copy's path.

    Raises ConfigError for an unknown name, and for a copy that would replace a file.
    """
    source = _shipped_path(name, "not a config of this package")
    target = to / source.name if to.is_dir() else to
    if target.exists():
        raise ConfigError(f"{target} exists: remove it, or name another file")
    shutil.copyfile(source, target)
    return target


def _shipped_path(name: str, otherwise: str) -> Path:
    """Return the file of a config of this package. Raises ConfigError, which says `otherwise`, if there is none."""
    paths = {config.name: config.path for config in list_configs()}
    if name not in paths:
        close = difflib.get_close_matches(name, paths, n=1)
        way_out = f"did you mean {close[0]}?" if close else "`rayjobs configs` lists them"
        raise ConfigError(f"{name}: {otherwise}; {way_out}")
    return paths[name]


def _read_header(path: Path) -> ShippedConfig:
    """Read the comment that a config opens with: its command, then what it does."""
    lines = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.startswith("#"):
                break
            lines.append(line.lstrip("# ").rstrip())
    command, *about = lines
    words = command.split()
    summary = " ".join(about).partition(". ")[0].rstrip(".") + "."
    return ShippedConfig(path.stem, words[words.index("rayjobs") + 1], summary, path)
