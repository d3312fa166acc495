"""The frozen base model of a config."""

from pathlib import Path
from typing import Literal

import torch

from adapter.base.checkpoint import Checkpoint, open_checkpoint
from adapter.model import AdaptedModel
from adapter.tokenizers.load import load_tokenizer
from rayjobs.config import config
from rayjobs.errors import ConfigError
from rayjobs.storage.download import cached_path
from rayjobs.storage.paths import AnyPath, is_url, resolve_path

Dtype = Literal["fp32", "bf16"]
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@config
class BaseModelConfig:
    """The frozen base model."""

    path: AnyPath
    """Folder in Meta's format (params.json) or Hugging Face's (config.json); if it is a URL, every node copies it."""
    tokenizer: AnyPath | None = None
    """SentencePiece model; null for `tokenizer.model` in the folder or, in Meta's layout alone, beside it."""
    dtype: Dtype = "fp32"
    """Precision of the frozen weights, fp32 or bf16; the adapter is always fp32."""

    def open(self) -> tuple[Checkpoint, Path]:
        """Open the checkpoint, without reading weights, and check that its tokenizer fits.

        Returns the checkpoint and the tokenizer's path. Raises CheckpointError, TokenizerError or ConfigError, naming
        the file, for what is missing, damaged, or does not fit.
        """
        checkpoint = open_checkpoint(cached_path(self.path))
        path = resolve_path(self.tokenizer) if self.tokenizer else checkpoint.tokenizer_path
        if path is None:
            if (checkpoint.path / "tokenizer.json").is_file():
                load_tokenizer(checkpoint.path)  # raises the error that says why this one cannot be used
            raise ConfigError(f"{self.path}: no tokenizer.model in the folder; set base.tokenizer")
        if path.is_dir():
            path = path / "tokenizer.model"
        if is_url(self.path) and not self.tokenizer:
            path = resolve_path(self.path) / path.name  # the URL, because each machine has its own copy
        load_tokenizer(cached_path(path)).check_fits(checkpoint.config.vocab_size)
        return checkpoint, resolve_path(path)

    def load(self, adapter: str | None, device: str, *, encoder: str | None = None) -> AdaptedModel:
        """Load the base, with its adapter if a file or folder is named.

        encoder: identity of the image encoder in use, if any. Raises CheckpointError if the adapter cannot be read or
        was made for another base, tokenizer or encoder.
        """
        tokenizer = cached_path(self.tokenizer) if self.tokenizer else None
        model = AdaptedModel.from_pretrained(
            cached_path(self.path), tokenizer=tokenizer, dtype=TORCH_DTYPES[self.dtype], device=device
        )
        if adapter is not None:
            model.load_adapter(cached_path(adapter), encoder=encoder)
        return model
