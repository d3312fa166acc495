"""The adapters of a folder of runs: found, and noticed when they are added, replaced or removed."""

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from adapter.adapter_file import check_identities, check_shape
from adapter.adapter_header import read_header
from adapter.decoder import Decoder
from adapter.engine.adapters import AdapterStore
from adapter.errors import AdapterError
from adapter.templates import Template
from rayjobs.storage.hub_model import ADAPTER_FILE

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""Seconds that must pass before the folder is looked through again."""
SKIPPED = {"cache", "checkpoints", "parts"}
"""Folders of runs that hold no runs, beside those whose name begins with a dot."""
UNLOADED = "it was unloaded"
"""Why an adapter that was unloaded is not served."""

_Stamp = tuple[int, int, int]
"""The size, the time of the last change and the number of a file."""


class FoundAdapter(NamedTuple):
    """An adapter that is served."""

    path: Path
    stamp: _Stamp
    template: Template | None
    """The template of its training; None if the file does not say."""
    reads_images: bool

    @property
    def created(self) -> int:
        """The time of the file's last change, in seconds since 1970."""
        return self.stamp[1] // 10**9


class Change(NamedTuple):
    """A request to load or unload an adapter. Of several the greatest holds."""

    time_ns: int
    """The time, in nanoseconds since 1970."""
    served: bool
    """It was loaded; False if it was unloaded."""


class AdapterFolder:
    """Keeps an `AdapterStore` in step with a folder of runs. Its methods may be called from several threads."""

    def __init__(
        self,
        folder: Path | None,
        store: AdapterStore,
        model: Decoder,
        *,
        fingerprint: str | None = None,
        tokenizer_sha256: str | None = None,
        encoder: str | None = None,
        taken: str = "",
    ) -> None:
        """folder: None for no adapters. model: the base. Identities as in `AdapterStore`. taken: the base's own name,
        which no adapter gets."""
        self._folder, self._store, self._taken = folder, store, taken
        self._shape = model.config.sizes(), model.config.switches()
        self._identities = fingerprint, tokenizer_sha256
        self._encoder = encoder
        self._found: dict[str, FoundAdapter] = {}
        self._left_out: dict[str, tuple[_Stamp, str]] = {}
        self._changes: dict[str, Change] = {}
        self._looked = float("-inf")
        self._lock = threading.Lock()

    @property
    def adapters(self) -> dict[str, FoundAdapter]:
        """The adapters that are served, by name, as of the last look."""
        return dict(self._found)

    def get(self, name: str) -> FoundAdapter | None:
        """The adapter of a name, as of the last look."""
        return self._found.get(name)

    def find(self, name: str) -> FoundAdapter | None:
        """The adapter of a name as it is now: a file that has come, changed or gone is noticed."""
        found = self._found.get(name)
        if found is None:
            self.look()
        elif _stamp(found.path) != found.stamp:
            self.look(at_once=True)
        return self._found.get(name)

    def why_not(self, name: str) -> str:
        """The reason for which a run's adapter is not served; empty if nothing is known of such a run."""
        if self._is_unloaded(name):
            return UNLOADED
        return self._left_out[name][1] if name in self._left_out else ""

    def look(self, *, at_once: bool = False) -> None:
        """Look the folder through, unless that was done within the last second. at_once: in any case."""
        with self._lock:
            if self._folder is None or (not at_once and time.monotonic() - self._looked < LOOK_S):
                return
            present = dict(self._files())
            for name in self._found.keys() - present.keys():
                self._drop(name)
            self._left_out = {name: one for name, one in self._left_out.items() if name in present}
            for name, (path, stamp) in present.items():
                self._take(name, path, stamp)
            self._looked = time.monotonic()

    @property
    def changes(self) -> dict[str, Change]:
        """The last change of each adapter that was loaded or unloaded, whether or not its run is there now."""
        return dict(self._changes)

    def new_change(self, name: str, *, served: bool) -> Change:
        """A change of this moment, which is later than any that is known of the adapter, whatever the clock says."""
        known = self._changes.get(name)
        return Change(max(time.time_ns(), known.time_ns + 1 if known else 0), served)

    def merge(self, changes: Mapping[str, Change]) -> None:
        """Load and unload adapters, except where a later change of one is known. Changes may come in any order."""
        with self._lock:
            for name, change in changes.items():
                if name in self._changes and change <= self._changes[name]:
                    continue
                self._changes[name] = change
                if not change.served and name in self._found:
                    self._drop(name)

    def _is_unloaded(self, name: str) -> bool:
        return name in self._changes and not self._changes[name].served

    def _files(self) -> Iterator[tuple[str, tuple[Path, _Stamp]]]:
        """The adapters' files under the folder, each with the name of its run."""
        assert self._folder is not None
        for place, folders, files in os.walk(self._folder):
            folders[:] = [one for one in folders if one not in SKIPPED and not one.startswith(".")]
            if ADAPTER_FILE not in files:
                continue
            path = Path(place) / ADAPTER_FILE
            relative = Path(place).relative_to(self._folder)
            name = self._folder.name if relative == Path() else relative.as_posix()
            stamp = _stamp(path)
            if stamp is not None and name.isprintable() and name != self._taken:
                yield name, (path, stamp)

    def _take(self, name: str, path: Path, stamp: _Stamp) -> None:
        """Serve a file under its name, unless it is served already or cannot be."""
        known = self._found[name].stamp if name in self._found else self._left_out.get(name, (None,))[0]
        if known == stamp or self._is_unloaded(name):
            return
        try:
            file = read_header(path)
            check_shape(file, *self._shape)
            check_identities(file, *self._identities, self._encoder if file.vision else None)
        except (AdapterError, OSError) as error:
            self._leave_out(name, stamp, str(error).removeprefix(f"{path}: "))
            return
        if file.config.trains_base:
            self._leave_out(name, stamp, "full fine-tuning made it a base of its own: serve it as one")
            return
        self._left_out.pop(name, None)
        self._store.register(name, path)
        self._found[name] = FoundAdapter(path, stamp, file.template, file.vision is not None)

    def _leave_out(self, name: str, stamp: _Stamp, reason: str) -> None:
        logger.warning("%s is not served: %s", name, reason)
        if name in self._found:
            self._drop(name)
        self._left_out[name] = stamp, reason

    def _drop(self, name: str) -> None:
        self._found.pop(name)
        self._store.remove(name)


def _stamp(path: Path) -> _Stamp | None:
    """The stamp of a file; None if it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
