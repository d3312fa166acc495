"""A tiny DINO: it learns from the training scans, without labels, that two views of a scan are the same.

DINO (arXiv 2104.14294): a student sees one view of an image and predicts the teacher's distribution over prototypes for
another view; the teacher's weights are a moving average of the student's. Departure: instead of DINO's centring, which
keeps all images from the same prototype, Sinkhorn-Knopp centring as in DINOv2 (arXiv 2304.07193), which is stable from
the first step.

The encoder is a timm ResNet without pooling, because digits differ in where their strokes are.

Legend: B images, P prototypes, S side of an image.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from cafo.images import IMAGENET_MEAN, IMAGENET_STD
from rayjobs.demo.config import DigitsConfig, TinyDinoConfig
from rayjobs.demo.digits import split_scans
from rayjobs.demo.font_digits import SIDE, distort
from rayjobs.demo.optim import train_steps
from rayjobs.storage.files import atomic_path

ARCHITECTURE = "resnet10t"
SHAPE: dict[str, Any] = {"channels": [16, 32, 32, 32], "stem_width": 8, "output_stride": 8, "global_pool": ""}


class _Net(nn.Module):
    """Encoder, projection head and prototypes: (B, 3, S, S) → cosines (B, P)."""

    def __init__(self, prototypes: int) -> None:
        import timm  # takes seconds; the models that are trained beside this one do not need it

        super().__init__()
        self.encoder = timm.create_model(ARCHITECTURE, num_classes=0, **SHAPE)
        width = self.encoder.eval()(torch.zeros(1, 3, SIDE, SIDE)).numel()
        self.head = nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, 64))
        self.prototypes = nn.Linear(64, prototypes, bias=False)
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        projected = F.normalize(self.head(self.encoder(images).flatten(1)), dim=1)
        return projected @ F.normalize(self.prototypes.weight, dim=1).T


def train_dino(settings: TinyDinoConfig, digits: DigitsConfig, folder: Path, device: str) -> Iterator[float]:
    """Train by self-distillation; yield the loss of every step, then write the teacher in timm's format."""
    scans = torch.stack([image for _, image, _ in split_scans(digits)["train"]])
    rng = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        student = _Net(settings.prototypes).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)

    def loss_of_step(step: int) -> Tensor:
        batch = scans[torch.randint(len(scans), (settings.batch,), generator=rng)]
        first, second = _view(batch, rng).to(device), _view(batch, rng).to(device)
        loss = torch.zeros((), device=device)
        for student_view, teacher_view in ((first, second), (second, first)):
            with torch.no_grad():
                target = sinkhorn_knopp(teacher(teacher_view) / settings.teacher_temperature)
            loss = loss + F.cross_entropy(student(student_view) / settings.student_temperature, target) / 2
        return loss

    steps = train_steps(
        student, loss_of_step, steps=settings.steps, peak_lr=settings.lr, weight_decay=0.04, max_grad_norm=3.0
    )
    for loss in steps:
        _update_teacher(teacher, student, settings.momentum)
        yield loss
    _save(teacher.encoder, folder)


@torch.no_grad()
def _update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.lerp_(fast, 1 - momentum)


def sinkhorn_knopp(logits: Tensor) -> Tensor:
    """Distributions (B, P) over prototypes whose totals per prototype are about equal, by three iterations."""
    shares = torch.exp(logits - logits.max())
    for _ in range(3):
        shares = shares / shares.sum(dim=0, keepdim=True)
        shares = shares / shares.sum(dim=1, keepdim=True)
    return shares


def _view(scans: Tensor, rng: torch.Generator) -> Tensor:
    """A random view of each scan, (B, S, S) → (B, 3, S, S): distorted, with other contrast, and with noise."""
    images = distort(
        scans, rng, turn=0.2, slant=(-0.3, 0.3), width=(0.75, 1.2), height=(0.8, 1.15), move=(0.2, 0.15), wobble=0.1
    )
    ink = torch.rand(len(scans), 1, 1, generator=rng) * 0.45 + 0.8
    images = (images * ink + 0.05 * torch.randn(images.shape, generator=rng)).clamp(0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images[:, None] - mean) / std


def _save(encoder: nn.Module, folder: Path) -> None:
    """Write the encoder in timm's format."""
    preprocessing = {"input_size": [3, SIDE, SIDE], "crop_pct": 1.0, "interpolation": "bicubic"}
    about = {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "model_args": SHAPE,
        "pretrained_cfg": {**preprocessing, "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
    }
    (folder / "config.json").write_text(json.dumps(about, indent=2))
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file({name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}, temporary)
