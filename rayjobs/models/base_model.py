"""The frozen base model of a config."""

from pathlib import Path
from typing import Literal

from adapter.base.checkpoint import Checkpoint, open_checkpoint
from adapter.base.quantization import PRECISIONS, bitsandbytes
from adapter.model import AdaptedModel
from adapter.tokenizers.load import describe_missing, load_tokenizer
from rayjobs.config import config
from rayjobs.errors import ConfigError
from rayjobs.storage.download import cached_path
from rayjobs.storage.paths import AnyPath, resolve_path

Dtype = Literal["fp32", "bf16", "int8", "nf4"]
"""The names in `adapter.base.quantization.PRECISIONS`."""


@config
class BaseModelConfig:
    """The frozen base model."""

    path: AnyPath
    """Folder in Meta's format (params.json) or Hugging Face's (config.json); if it is a URL, every node copies it."""
    tokenizer: AnyPath | None = None
    """Tokenizer, as a file or a folder that has one: tokenizer.json, or tokenizer.model in SentencePiece's or Llama 3's
    format. null for the base's own, in its folder or, in Meta's layout alone, beside it."""
    dtype: Dtype = "fp32"
    """How the frozen weights are held: fp32; bf16; or the linear layers of the blocks in int8 or nf4 (8 or 4 bits, by
    bitsandbytes: pip install 'rayjobs[quantization]') and the rest in bf16. The adapter is always fp32."""

    def open(self) -> tuple[Checkpoint, Path]:
        """Open the checkpoint, without reading weights, and check that its tokenizer fits.

        Returns the checkpoint and the tokenizer's path. Raises CheckpointError, TokenizerError or ConfigError, naming
        the file, for what is missing, damaged, or does not fit; AdapterError if the library that quantizes is missing.
        """
        if PRECISIONS[self.dtype].quantization:
            bitsandbytes()
        copy = cached_path(self.path)
        checkpoint = open_checkpoint(copy)
        path = self.tokenizer or checkpoint.tokenizer_path
        if path is None:
            raise ConfigError(f"{describe_missing(copy)}; or set base.tokenizer")
        if path == copy:
            path = self.path  # the URL, because each machine has its own copy
        load_tokenizer(cached_path(path)).check_fits(checkpoint.config.vocab_size)
        return checkpoint, resolve_path(path)

    def load(self, adapter: str | None, device: str, *, encoder: str | None = None) -> AdaptedModel:
        """Load the base, with its adapter if a file or folder is named.

        encoder: identity of the image encoder in use, if any. Raises CheckpointError if the adapter cannot be read or
        was made for another base, tokenizer or encoder.
        """
        tokenizer = cached_path(self.tokenizer) if self.tokenizer else None
        dtype, quantization = PRECISIONS[self.dtype]
        model = AdaptedModel.from_pretrained(
            cached_path(self.path), tokenizer=tokenizer, dtype=dtype, quantization=quantization, device=device
        )
        if adapter is not None:
            model.load_adapter(cached_path(adapter), encoder=encoder)
        return model
