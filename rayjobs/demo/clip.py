"""A tiny CLIP: open_clip's own class, trained on printed digits with captions. It never sees a handwritten scan."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cafo.images import CLIP_MEAN, CLIP_STD
from rayjobs.demo.captions import sample_caption
from rayjobs.demo.config import TinyClipConfig
from rayjobs.demo.font_digits import SIDE, printed_digits, render_fonts
from rayjobs.demo.optim import train_steps
from rayjobs.storage.files import atomic_path


def model_config(settings: TinyClipConfig) -> dict[str, Any]:
    """open_clip's model JSON."""
    return {
        "embed_dim": settings.embed_dim,
        "vision_cfg": {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": settings.width},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 1},
    }


def train_clip(settings: TinyClipConfig, folder: Path, device: str) -> Iterator[float]:
    """Train by the contrastive loss; yield the loss of every step, then write the folder in open_clip's format."""
    import open_clip  # takes seconds; the models that are trained beside this one do not need it

    image_rng, caption_rng = torch.Generator().manual_seed(settings.seed), random.Random(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = open_clip.CLIP(**model_config(settings)).to(device)
    tokenize = open_clip.SimpleTokenizer(context_length=model_config(settings)["text_cfg"]["context_length"])
    contrastive_loss = open_clip.ClipLoss()
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    fonts = render_fonts()

    def loss_of_step(step: int) -> Tensor:
        digits = torch.randint(10, (settings.batch,), generator=image_rng)
        images = (printed_digits(fonts, digits, image_rng)[:, None] - mean) / std
        captions = tokenize([sample_caption(int(digit), caption_rng) for digit in digits])
        return contrastive_loss(*model(images.to(device), captions.to(device)))

    yield from train_steps(
        model, loss_of_step, steps=settings.steps, peak_lr=settings.lr, weight_decay=0.1, betas=(0.9, 0.98)
    )
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with atomic_path(folder / "open_clip_model.safetensors") as temporary:
        save_file(state, temporary)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_config(settings)}, indent=2))
