"""A reader, the files that it is tried on, and one input: these files with one of them damaged."""

import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tests.fuzz.guard import watched
from tests.fuzz.mutation import mutate

Files = Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A reader of what a user points at."""

    name: str
    make: Callable[[Path], object]
    """Writes good files into a folder, by our own writers where we have them."""
    read: Callable[[Path], object]
    """Reads them."""
    damaged: tuple[str, ...] = ("*",)
    """Patterns of the files that are damaged; the others stay."""
    quick: bool = True
    """Its files are made, and read for the first time, in less than a second."""
    share: int = 1
    """Its share of the inputs, relative to the others: larger if it is fast."""


class Bench:
    """A folder in which one target's files lie, damaged one at a time."""

    def __init__(self, target: Target, folder: Path, *, proven: bool = False) -> None:
        """proven: the good files were read before."""
        self.target, self.folder = target, folder
        folder.mkdir(parents=True)
        target.make(folder)
        paths = sorted(folder.rglob("*"))
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.is_file()}
        self.folders = {path for path in paths if path.is_dir()}
        self.names = [name for name in self.files if any(fnmatch(name, one) for one in target.damaged)]
        self.changed = ""
        if not proven:
            target.read(folder)  # what is imported on first use is, and the good files are good

    def damage(self, rng: random.Random) -> None:
        """Damage one file by chance."""
        self.restore()
        self.changed = name = rng.choice(self.names)
        path, odds = self.folder / name, rng.random()
        if odds > 0.05:
            path.write_bytes(mutate(self.files[name], name, rng))
            return
        path.unlink()
        if odds < 0.015:
            path.mkdir()
        elif odds < 0.025:
            path.symlink_to(path.name)
        elif odds < 0.035:
            path.symlink_to("nothing")

    def put(self, name: str, content: bytes) -> None:
        """Put a content in place of a file."""
        self.restore()
        self.changed = name
        (self.folder / name).write_bytes(content)

    def restore(self) -> None:
        """Undo the damage, and remove what the reader wrote beside the files."""
        if not self.changed:
            return
        for left in sorted(self.folder.rglob("*"), reverse=True):
            name = left.relative_to(self.folder).as_posix()
            if left.is_dir() and not left.is_symlink():
                if left not in self.folders and name != self.changed:
                    left.rmdir()
            elif name not in self.files:
                left.unlink()
        path = self.folder / self.changed
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):
            path.unlink()
        path.write_bytes(self.files[self.changed])
        self.changed = ""

    def try_read(self) -> bool:
        """Read; return whether the input was accepted. Raises Misbehaviour."""
        from rayjobs.errors import is_user_error

        try:
            with watched(self.folder):
                self.target.read(self.folder)
        except Exception as error:
            if is_user_error(error):
                return False
            raise
        return True
