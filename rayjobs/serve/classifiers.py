"""The classifiers of a folder by name: runs of cafo-tune and cafo, and files that `CaFo.save` wrote.

A classifier is read when it is first asked for, and again after its file has changed. The least recently used ones are
dropped, and with them the encoders that no other uses. A name is looked up among those that the folder has; no part of
a request is ever made a path.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from rayjobs.models.encoder import VisionEncoderConfig, encoder_of, load_vision_encoder
from rayjobs.serve.api_errors import ApiError

if TYPE_CHECKING:
    from torch import Tensor

    from cafo.encoders import ImageEncoder
    from cafo.images import Preprocess
    from rayjobs.tune.classifier import OpenedClassifier

_DEEPEST = 3
"""Folders below the folder of the runs in which a run is looked for."""


@dataclass(frozen=True, eq=False)
class FeatureSource:
    """The features of one encoder that a classifier reads."""

    encoder: ImageEncoder
    unprojected: bool
    """True for what comes before the encoder's last projection."""

    @property
    def preprocess(self) -> Preprocess:
        """From an image to the encoder's pixels."""
        return self.encoder.preprocess

    def encode(self, batch: Tensor) -> Tensor:
        """Encode pixels (B, 3, S, S): (B, C) float32 on the CPU."""
        encoder: Any = self.encoder
        return (encoder.encode_unprojected(batch) if self.unprojected else encoder.encode_image(batch)).cpu()


@dataclass(frozen=True, eq=False)
class LoadedClassifier:
    """A classifier with its encoders."""

    path: Path
    """Its run folder, or its own file."""
    written_ns: int | None
    """Time at which its file was last changed before it was read, in nanoseconds."""
    opened: OpenedClassifier
    sources: Mapping[str, FeatureSource]


class ClassifierFolder:
    """The classifiers below a folder. Its methods may be called from any thread."""

    def __init__(
        self,
        folder: str | Path,
        *,
        encoders: Mapping[str, VisionEncoderConfig] | None = None,
        device: str = "cpu",
        keep: int = 8,
    ) -> None:
        """folder: with the runs. encoders: by name, for single files, and in place of a run's own. device: of the
        encoders. keep: classifiers that stay in memory."""
        self.folder, self.encoders, self.device, self.keep = Path(folder), dict(encoders or {}), device, keep
        self._loaded: OrderedDict[str, LoadedClassifier] = OrderedDict()
        self._in_memory: WeakValueDictionary[str, ImageEncoder] = WeakValueDictionary()
        self._lock = threading.Lock()

    def paths(self) -> dict[str, Path]:
        """Return the run folders and files by name, as they are now."""
        from rayjobs.tune.selection import CHOSEN

        found = {}
        for depth in range(1, _DEEPEST + 1):
            for file in sorted(self.folder.glob("/".join(["*"] * depth + [CHOSEN]))):
                found[file.parent.relative_to(self.folder).as_posix()] = file.parent
        for file in sorted(self.folder.glob("*.safetensors")) if self.encoders else ():
            found.setdefault(file.stem, file)
        return found

    def load(self, name: str) -> LoadedClassifier:
        """Return a classifier, from memory if it is there and its file is the same.

        Raises ApiError with status 404 for a name that the folder does not have, and what `open_saved` and `open_run`
        of `rayjobs.tune.classifier` raise.
        """
        with self._lock:  # one at a time: two requests for the same classifier must not read it twice
            known = self._loaded.get(name)
            if known is None or known.written_ns != _written_ns(known.path):
                self._loaded.pop(name, None)
                self._loaded[name] = known = self._read(self._find(name))
            self._loaded.move_to_end(name)
            while len(self._loaded) > self.keep:
                self._loaded.popitem(last=False)
            return known

    def _find(self, name: str) -> Path:
        """The run folder or the file of a name. Raises ApiError with status 404 for one that the folder lacks."""
        paths = self.paths()
        if name not in paths:
            there = ", ".join(list(paths)[:20]) or "none"
            raise ApiError(
                f"there is no classifier {name!r:.80}; there are: {there}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return paths[name]

    def _read(self, path: Path) -> LoadedClassifier:
        from rayjobs.tune.classifier import open_run, open_saved

        written_ns = _written_ns(path)
        encoders: Mapping[str, VisionEncoderConfig]
        if path.is_file():
            opened, encoders = open_saved(path), self.encoders
        else:
            opened, encoders = open_run(path)
            encoders = {**encoders, **self.encoders}
        configs = opened.configs(encoders)
        sources = {source: self._source(opened, source, configs[encoder_of(source)]) for source in opened.sources}
        return LoadedClassifier(path, written_ns, opened, sources)

    def _source(self, opened: OpenedClassifier, source: str, config: VisionEncoderConfig) -> FeatureSource:
        encoder = self._in_memory.get(repr(config))
        if encoder is None:
            encoder = self._in_memory[repr(config)] = load_vision_encoder(config, self.device)
        unprojected = source != encoder_of(source)
        opened.check_encoder(source, f"{encoder.identity}-unprojected" if unprojected else encoder.identity)
        return FeatureSource(encoder, unprojected)


def _written_ns(path: Path) -> int | None:
    """The time of the last change of a classifier's file, or of its run's choice; None if it is gone."""
    from rayjobs.tune.selection import CHOSEN

    try:
        return (path / CHOSEN if path.is_dir() else path).stat().st_mtime_ns
    except OSError:
        return None
