"""The frozen base model that a config names."""

from pathlib import Path
from typing import Literal

import torch

from adapter.base_checkpoint import Checkpoint, open_checkpoint
from adapter.model import AdaptedModel
from adapter.tokenizer import Tokenizer
from rayjobs.config import config
from rayjobs.errors import UserError
from rayjobs.storage.download import cached_path
from rayjobs.storage.paths import AnyPath, is_url, resolve_path

Dtype = Literal["fp32", "bf16"]
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@config
class BaseModelConfig:
    """The frozen LLaMA."""

    path: AnyPath
    """A folder in Meta's format (params.json) or Hugging Face's (config.json); of a URL every node makes a copy."""
    tokenizer: AnyPath | None = None
    """SentencePiece model; by default `tokenizer.model` in the folder or beside it."""
    dtype: Dtype = "fp32"
    """What the frozen weights are held in; prompts and gates are always fp32."""

    def open(self) -> tuple[Checkpoint, Path]:
        """The checkpoint and its tokenizer's path, both proven to fit. Raises ValueError naming what does not."""
        checkpoint = open_checkpoint(cached_path(self.path))
        path = resolve_path(self.tokenizer) if self.tokenizer else checkpoint.tokenizer_path
        if path is None:
            raise UserError(f"{self.path}: no tokenizer.model in the folder or beside it; set base.tokenizer")
        if is_url(self.path) and not self.tokenizer:
            path = resolve_path(self.path) / path.name  # other machines have copies of their own
        Tokenizer(cached_path(path)).check_fits(checkpoint.config.vocab_size)
        return checkpoint, resolve_path(path)

    def load(self, adapter: str | None, device: str, *, encoder: str | None = None) -> AdaptedModel:
        """The whole model in memory, with an adapter file of any known form if one is named.

        encoder: identity of the image encoder in use. Raises ValueError if the adapter was made for another one.
        """
        tokenizer = cached_path(self.tokenizer) if self.tokenizer else None
        base = AdaptedModel.from_pretrained(
            cached_path(self.path), tokenizer=tokenizer, dtype=TORCH_DTYPES[self.dtype], device=device
        )
        if adapter is not None:
            base.load_adapter(cached_path(adapter), encoder=encoder)
        return base
