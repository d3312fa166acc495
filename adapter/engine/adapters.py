"""The adapters that an engine serves, by name: files, of which those in use are held in memory.

An adapter is read when a sequence first needs it. The keys and values of its prompts are then kept until the memory for
them is used up; the least recently used go first. A sequence that runs keeps its own, so none loses its adapter.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from adapter.adapter_file import check_identities, check_shape, check_tensors, put_tensors
from adapter.adapter_formats import read_adapter
from adapter.adaption import Gate
from adapter.base.binding import meta_decoder
from adapter.decoder import Decoder
from adapter.engine.row_parts import AdapterParts, PartRows
from adapter.engine.row_prompts import AdapterPrompts, PromptLayers, read_prompts
from adapter.errors import AdapterError, CheckpointError
from adapter.image_projection import ImageProjection

DEFAULT_CACHE_BYTES = 256 * 2**20


class UnknownAdapterError(AdapterError):
    """A request names an adapter that is not registered."""


@dataclass(frozen=True, kw_only=True)
class AdapterSource:
    """The file of a registered adapter."""

    path: Path
    gate: Gate | None = None
    """The gate convention of a file that does not state it (see `read_adapter`)."""


class RowAdapter(NamedTuple):
    """The adapter of a sequence, as the engine needs it."""

    prompts: AdapterPrompts | None
    """None for an adapter without prompts, and for the base alone."""
    parts: AdapterParts | None
    """The parts within the base's layers; None for an adapter of prompts, and for the base alone."""


@dataclass(frozen=True, eq=False)
class _Loaded:
    """An adapter in memory."""

    adapter: RowAdapter
    """The adapter without an image."""
    layers: PromptLayers
    """The layers, kept of an adapter that reads images: each image makes keys and values of its own."""
    vision: ImageProjection | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of the adapter's tensors, computed keys and values among them."""
        modules = [*self.layers.modules, *([] if self.vision is None else [self.vision])]
        held = [one.n_bytes for one in self.adapter if one is not None]
        return sum(held) + sum(p.nbytes for module in modules for p in module.parameters())


class AdapterStore:
    """Adapters for one base, by name. Methods may be called from several threads."""

    def __init__(
        self,
        model: Decoder,
        *,
        fingerprint: str | None = None,
        tokenizer_sha256: str | None = None,
        encoder: str | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        """model: the base; an adapter that it holds itself serves requests that name none.

        fingerprint, tokenizer_sha256, encoder: identities that adapter files are compared with, as in `apply_adapter`.
        cache_bytes: memory for the prompts' keys and values of named adapters; the last one used is kept regardless.
        """
        self._model = model
        self._identities = fingerprint, tokenizer_sha256, encoder
        self._holder = meta_decoder(model.config)  # a base without weights, for the parts of an adapter that is read
        self._cache_bytes = cache_bytes
        self._sources: dict[str, AdapterSource] = {}
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()  # least recently used first
        self._own: _Loaded | None = None
        self._parts = PartRows(model)
        self._lock = threading.RLock()

    @property
    def names(self) -> list[str]:
        """The registered names, in order."""
        with self._lock:
            return sorted(self._sources)

    @property
    def cached_bytes(self) -> int:
        """Bytes of the named adapters in memory."""
        with self._lock:
            return sum(one.n_bytes for one in self._loaded.values())

    def register(self, name: str, path: str | Path, *, gate: Gate | None = None) -> None:
        """Give a file a name, in place of the adapter of that name. The file is read when it is first needed.

        Raises AdapterError for an empty name.
        """
        if not name:
            raise AdapterError(f"the adapter {path} needs a name to be asked for by")
        with self._lock:
            self._sources[name] = AdapterSource(path=Path(path), gate=gate)
            self._loaded.pop(name, None)

    def remove(self, name: str) -> None:
        """Forget an adapter; sequences that run keep it. Raises UnknownAdapterError for a name that is not known."""
        self.check(name)
        with self._lock:
            self._sources.pop(name, None)
            self._loaded.pop(name, None)

    def check(self, name: str | None) -> None:
        """Raise UnknownAdapterError for a name that is not registered; None is the model as it is."""
        if name is not None and name not in self._sources:
            known = self.names
            listed = f"{', '.join(known[:5])}{', …' if len(known) > 5 else ''}" if known else "none is registered"
            raise UnknownAdapterError(f"there is no adapter {name!r}; known: {listed}")

    def get(self, name: str | None, image: Tensor | None = None) -> RowAdapter:
        """Return an adapter as a sequence needs it. image: the features (F,) of the sequence's image, if it has one.

        Raises CheckpointError for a file that cannot be read or does not fit the base, UnknownAdapterError for a name
        that is not registered, AdapterError for features that the adapter cannot read.
        """
        with self._lock:
            loaded = self._get_own() if name is None else self._get(name)
            if image is None:
                return loaded.adapter
            token = _image_token(loaded.vision, image, self._model.tok_embeddings.weight.device)
            parts = loaded.adapter.parts
            return RowAdapter(self._read_prompts(loaded.layers, parts, token), parts)

    def _get_own(self) -> _Loaded:
        if self._own is None:
            layers, parts = PromptLayers.of(self._model), self._parts.own
            self._own = _Loaded(RowAdapter(self._read_prompts(layers, parts), parts), layers, self._model.vision)
        return self._own

    def _get(self, name: str) -> _Loaded:
        self.check(name)
        if name not in self._loaded:
            self._loaded[name] = self._load(self._sources[name])
        self._loaded.move_to_end(name)
        while len(self._loaded) > 1 and self.cached_bytes > self._cache_bytes:
            self._loaded.popitem(last=False)
        return self._loaded[name]

    @torch.inference_mode()
    def _load(self, source: AdapterSource) -> _Loaded:
        file = read_adapter(source.path, gate=source.gate)
        if file.config.trains_base:
            raise CheckpointError(
                f"{source.path}: full fine-tuning made this a base of its own, which cannot share a batch with "
                "adapters of another: serve it alone"
            )
        config, holder = self._model.config, self._holder
        check_shape(file, config.sizes(), config.switches())
        check_identities(file, *self._identities)
        holder.add_adapter(file.config)
        check_tensors(file, holder)
        put_tensors(holder, file.config.unpack(file.tensors, config))
        device = self._model.tok_embeddings.weight.device
        for part in holder.adapter_modules:
            part.to(device)
        parts, layers = AdapterParts.of(holder), PromptLayers.of(holder)
        adapter = RowAdapter(self._read_prompts(layers, parts), parts)
        return _Loaded(adapter, PromptLayers() if holder.vision is None else layers, holder.vision)

    def _read_prompts(
        self, layers: PromptLayers, parts: AdapterParts | None, image: Tensor | None = None
    ) -> AdapterPrompts | None:
        """The prompts' keys and values, which go through the adapter's parts of wk and wv."""
        with self._parts.installed([(parts, 1)]):  # of all tokens, however many they are
            return read_prompts(self._model, layers, image)


@torch.inference_mode()
def _image_token(vision: ImageProjection | None, image: Tensor, device: torch.device) -> Tensor:
    """The image token (C,) of features (F,)."""
    if vision is None:
        raise AdapterError("there are images, but the adapter was made for text alone: train one with vision")
    if image.shape != (vision.down.in_features,):
        width, given = vision.down.in_features, tuple(image.shape)
        raise AdapterError(f"the adapter reads {width} features of an image, got {given}: another encoder?")
    return vision(image[None].to(device))[0]
