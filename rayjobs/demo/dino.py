"""A tiny DINO: it learns from the training scans without their labels that two views of one scan are the same.

DINO (arXiv 2104.14294): a student sees a view and predicts what the teacher, a moving average of the student, says of
another view, as a distribution over prototypes. What keeps all scans from meeting in one prototype is here the
Sinkhorn-Knopp centring of its successor (arXiv 2304.07193), which is steady from the first step on.

The encoder is a timm ResNet whose last map is read as a whole: digits need positions, which pooling would lose.

Legend: B images, P prototypes, S side of a picture.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from cafo.images import IMAGENET_MEAN, IMAGENET_STD
from rayjobs.config import config
from rayjobs.demo.digits import DigitsConfig, divided
from rayjobs.demo.font_digits import SIDE, bent
from rayjobs.storage.files import atomic_path

ARCHITECTURE = "resnet10t"
SHAPE: dict[str, Any] = {"channels": [16, 32, 32, 32], "stem_width": 8, "output_stride": 8, "global_pool": ""}


@config
class DinoStandIn:
    """A DINO that has seen the training scans, and no label."""

    steps: int = Field(default=100, ge=1)
    """Optimizer steps."""
    batch: int = Field(default=128, ge=2)
    """Scans per step, each in two views."""
    prototypes: int = Field(default=256, ge=2)
    """P."""
    lr: float = Field(default=4e-3, gt=0)
    """Peak learning rate."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """How much of the teacher stays at each step."""
    teacher_temperature: float = Field(default=0.04, gt=0)
    """Low: the teacher is sure."""
    student_temperature: float = Field(default=0.1, gt=0)
    """Higher: the student has to become sure by itself."""
    seed: int = Field(default=0, ge=0)
    """Of the views and the initial weights."""


class _Net(nn.Module):
    """Encoder, projection head and prototypes: (B, 3, S, S) → cosines (B, P)."""

    def __init__(self, prototypes: int) -> None:
        import timm  # seconds, which the models trained beside this one can spare

        super().__init__()
        self.encoder = timm.create_model(ARCHITECTURE, num_classes=0, **SHAPE)
        width = self.encoder.eval()(torch.zeros(1, 3, SIDE, SIDE)).numel()
        self.head = nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, 64))
        self.prototypes = nn.Linear(64, prototypes, bias=False)
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        projected = F.normalize(self.head(self.encoder(images).flatten(1)), dim=1)
        return projected @ F.normalize(self.prototypes.weight, dim=1).T


def train_dino(settings: DinoStandIn, digits: DigitsConfig, folder: Path, device: str) -> Iterator[float]:
    """Self-distillation, yielding the loss of every step; at its end the folder holds what timm reads."""
    scans = torch.stack([picture for _, picture, _ in divided(digits)["train"]])
    dice = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        student = _Net(settings.prototypes).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.lr, weight_decay=0.04)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, settings.steps, cycle_momentum=False)
    for _ in range(settings.steps):
        batch = scans[torch.randint(len(scans), (settings.batch,), generator=dice)]
        one, other = _view(batch, dice).to(device), _view(batch, dice).to(device)
        loss = torch.zeros((), device=device)
        for seen, told in ((one, other), (other, one)):
            with torch.no_grad():
                target = centred(teacher(told) / settings.teacher_temperature)
            loss = loss + F.cross_entropy(student(seen) / settings.student_temperature, target) / 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 1 - settings.momentum)
        yield loss.item()
    _save(teacher.encoder, folder)


def centred(logits: Tensor) -> Tensor:
    """Distributions (B, P) over prototypes that all prototypes share in equally, by three turns of Sinkhorn-Knopp."""
    shares = torch.exp(logits - logits.max())
    for _ in range(3):
        shares = shares / shares.sum(dim=0, keepdim=True)
        shares = shares / shares.sum(dim=1, keepdim=True)
    return shares


def _view(scans: Tensor, dice: torch.Generator) -> Tensor:
    """Another look at each scan, (B, S, S) → (B, 3, S, S): turned, slanted, moved, stretched, bent, soiled."""
    seen = bent(
        scans, dice, turn=0.2, slant=(-0.3, 0.3), width=(0.75, 1.2), height=(0.8, 1.15), move=(0.2, 0.15), wobble=0.1
    )
    ink = torch.rand(len(scans), 1, 1, generator=dice) * 0.45 + 0.8
    seen = (seen * ink + 0.05 * torch.randn(seen.shape, generator=dice)).clamp(0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (seen[:, None] - mean) / std


def _save(encoder: nn.Module, folder: Path) -> None:
    """A folder in timm's format."""
    recipe = {"input_size": [3, SIDE, SIDE], "crop_pct": 1.0, "interpolation": "bicubic"}
    about = {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "model_args": SHAPE,
        "pretrained_cfg": {**recipe, "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
    }
    (folder / "config.json").write_text(json.dumps(about, indent=2))
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file({name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}, temporary)
