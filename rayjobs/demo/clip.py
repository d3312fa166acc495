"""A tiny CLIP: open_clip's own class, trained on printed digits and captions, and never shown a scan."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import nn

from cafo.images import CLIP_MEAN, CLIP_STD
from rayjobs.config import config
from rayjobs.demo.captions import caption
from rayjobs.demo.font_digits import SIDE, masters, printed
from rayjobs.storage.files import atomic_path


@config
class ClipStandIn:
    """A CLIP that has read printed digits with their captions."""

    width: int = Field(default=16, ge=8)
    """Of the ResNet's first stage, in channels."""
    embed_dim: int = Field(default=64, ge=8)
    """Width of the features."""
    steps: int = Field(default=300, ge=1)
    """Optimizer steps."""
    batch: int = Field(default=64, ge=2)
    """Pictures per step."""
    lr: float = Field(default=2e-3, gt=0)
    """Peak learning rate."""
    seed: int = Field(default=0, ge=0)
    """Of the pictures, the captions and the initial weights."""

    def model_config(self) -> dict[str, Any]:
        """open_clip's model JSON."""
        return {
            "embed_dim": self.embed_dim,
            "vision_cfg": {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": self.width},
            "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 1},
        }


def train_clip(settings: ClipStandIn, folder: Path, device: str) -> Iterator[float]:
    """Contrastive training, yielding the loss of every step; at its end the folder holds what open_clip reads."""
    import open_clip  # seconds, which the models trained beside this one can spare

    dice, words = torch.Generator().manual_seed(settings.seed), random.Random(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = open_clip.CLIP(**settings.model_config()).to(device)
    tokenize = open_clip.SimpleTokenizer(context_length=settings.model_config()["text_cfg"]["context_length"])
    contrast = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, settings.steps, cycle_momentum=False)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    fonts = masters()
    for _ in range(settings.steps):
        digits = torch.randint(10, (settings.batch,), generator=dice)
        images = (printed(fonts, digits, dice)[:, None] - mean) / std
        captions = tokenize([caption(int(digit), words) for digit in digits])
        loss = contrast(*model(images.to(device), captions.to(device)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with atomic_path(folder / "open_clip_model.safetensors") as temporary:
        save_file(state, temporary)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings.model_config()}, indent=2))
