"""The frozen base model of a config. Importing this module imports no PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from adapter.tokenizers.base import Tokenizer
from adapter.tokenizers.load import describe_missing, load_tokenizer
from rayjobs.config import config
from rayjobs.errors import ConfigError
from rayjobs.storage.download import cached_path
from rayjobs.storage.hub import HubPath, is_hub_path
from rayjobs.storage.hub_model import bytes_to_fetch, format_bytes
from rayjobs.storage.paths import ModelPath, resolve_path

if TYPE_CHECKING:
    from adapter.base.checkpoint import Checkpoint
    from adapter.model import AdaptedModel

Dtype = Literal["fp32", "bf16", "int8", "nf4"]
"""The names in `adapter.base.quantization.PRECISIONS`."""


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a path, a URL or a hub id, whose weights stay on the hub. Raises TokenizerError."""
    return load_tokenizer(cached_path(path, weights=False))


@config
class BaseModelConfig:
    """The frozen base model."""

    path: ModelPath
    """Folder in Meta's format (params.json) or Hugging Face's (config.json), or a GGUF file; or, if there is neither,
    an id on the Hugging Face hub: org/name, org/name@revision. Of a URL or a hub id, every node makes a copy."""
    tokenizer: ModelPath | None = None
    """Tokenizer, as a file or a folder that has one: tokenizer.json, or tokenizer.model in SentencePiece's or Llama 3's
    format. null for the base's own, in its folder or file or, in Meta's layout alone, beside it."""
    dtype: Dtype = "fp32"
    """Precision of the frozen weights: fp32; bf16; or the linear layers of the blocks in int8 or nf4 (8 or 4 bits, by
    bitsandbytes: pip install 'rayjobs[quantization]') and the rest in bf16. The adapter is always fp32."""

    def open(self, *, weights: bool = True) -> tuple[Checkpoint, Path]:
        """Open the checkpoint, without reading weights, and check that its tokenizer fits.

        weights: False where none are needed: those of a model on the hub stay there, and a folder may lack them. The
        checkpoint then has only a configuration.

        Returns the checkpoint and the tokenizer's path. Raises CheckpointError, TokenizerError or ConfigError, naming
        the file, for what is missing, damaged, or does not fit; AdapterError if the library that quantizes is missing.
        """
        from adapter.base.checkpoint import has_weight_files, open_checkpoint, open_config
        from adapter.base.hf_checkpoint import CONFIG
        from adapter.base.quantization import PRECISIONS, bitsandbytes

        if PRECISIONS[self.dtype].quantization:
            bitsandbytes()
        to_fetch = self.bytes_to_fetch()
        if to_fetch and not weights and HubPath.parse(self.path).file:
            size = format_bytes(to_fetch)
            raise ConfigError(
                f"{self.path}: a dry run fetches no weights; this file, {size}, has the settings in it too"
            )
        copy = cached_path(self.path, weights=not to_fetch)
        if to_fetch and (not weights or (copy / CONFIG).is_file()):
            checkpoint = open_config(copy)  # a model that cannot be used is refused before its weights are fetched
        elif not weights and (copy / CONFIG).is_file() and not has_weight_files(copy):
            checkpoint = open_config(copy)
        else:
            checkpoint = open_checkpoint(cached_path(self.path))
        path = self.tokenizer or checkpoint.tokenizer_path
        if path is None:
            raise ConfigError(f"{describe_missing(copy)}; or set base.tokenizer")
        if path == copy:
            path = self.path  # the URL, because each machine has its own copy
        open_tokenizer(path).check_fits(checkpoint.config.vocab_size)
        if weights and not checkpoint.has_weights:
            checkpoint = open_checkpoint(cached_path(self.path))
        return checkpoint, resolve_path(path)

    def bytes_to_fetch(self) -> int:
        """The size of the weights that are still on the hub; 0 for a base elsewhere."""
        return bytes_to_fetch(self.path) if is_hub_path(self.path) else 0

    def load(self, adapter: str | None, device: str, *, encoder: str | None = None) -> AdaptedModel:
        """Load the base, with its adapter if a file or folder is named.

        encoder: identity of the image encoder in use, if any. Raises CheckpointError if the adapter cannot be read or
        was made for another base, tokenizer or encoder.
        """
        from adapter.base.quantization import PRECISIONS
        from adapter.model import AdaptedModel

        tokenizer = cached_path(self.tokenizer, weights=False) if self.tokenizer else None
        dtype, quantization = PRECISIONS[self.dtype]
        model = AdaptedModel.from_pretrained(
            cached_path(self.path), tokenizer=tokenizer, dtype=dtype, quantization=quantization, device=device
        )
        if adapter is not None:
            model.load_adapter(cached_path(adapter), encoder=encoder)
        return model
