"""The frozen base model that a config names."""

from pathlib import Path
from typing import Literal

import torch

from adapter.base_checkpoint import Checkpoint, open_checkpoint
from adapter.model import Base
from adapter.tokenizer import Tokenizer
from rayjobs.config import config
from rayjobs.storage.paths import AnyPath, is_url, local_copy, place

Dtype = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@config
class BaseConfig:
    """The frozen LLaMA."""

    path: AnyPath
    """A folder in Meta's format (params.json) or Hugging Face's (config.json); of a URL every node makes a copy."""
    tokenizer: AnyPath | None = None
    """SentencePiece model; by default `tokenizer.model` in the folder or beside it."""
    dtype: Dtype = "fp32"
    """What the frozen weights are held in; prompts and gates are always fp32."""

    def open(self) -> tuple[Checkpoint, Path]:
        """The checkpoint and its tokenizer's path, both proven to fit. Raises ValueError naming what does not."""
        checkpoint = open_checkpoint(local_copy(self.path))
        path = place(self.tokenizer) if self.tokenizer else checkpoint.tokenizer_path
        if path is None:
            raise ValueError(f"{self.path}: no tokenizer.model in the folder or beside it; set base.tokenizer")
        if is_url(self.path) and not self.tokenizer:
            path = place(self.path) / path.name  # other machines have copies of their own
        Tokenizer(local_copy(path)).check_fits(checkpoint.config.vocab_size)
        return checkpoint, place(path)

    def load(self, adapter: str | None, device: str, *, tower: str | None = None) -> Base:
        """The whole model in memory, with an adapter file of any known form if one is named.

        tower: the identity of the tower whose features it will be given. Raises ValueError for an adapter of another.
        """
        tokenizer = local_copy(self.tokenizer) if self.tokenizer else None
        base = Base.load(local_copy(self.path), tokenizer=tokenizer, dtype=DTYPES[self.dtype], device=device)
        if adapter is not None:
            base.load_adapter(local_copy(adapter), tower=tower)
        return base
