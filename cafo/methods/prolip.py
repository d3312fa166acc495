"""ProLIP: CLIP's last visual projection is fine-tuned, and held near its pretrained value. RLA: the same on embeddings.

Fahes et al., "CLIP's Visual Embedding Projector is a Few-shot Cornucopia" (WACV 2026, arXiv 2410.05270). With x an
image's feature before the projection, and W₀, b the pretrained projection:

    z = x Wᵀ + b
    loss = cross-entropy of (100 unit(z) Tᵀ) + λ ‖W - W₀‖²          a sum over the entries; W = W₀ at first

trained by full-batch Adam, one view of each image per step, the learning rate falling along a cosine to zero. T and b
stand still. Without validation images λ = 1/K, K the images of a class.

RLA (regularised linear adapter) needs embeddings alone: x is the unit embedding, W₀ the identity, b = 0.

The authors train in float16, where Adam's second moment underflows; here all is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cafo.key_training import check_finite
from cafo.methods.base import (
    Features,
    FewShotImages,
    Given,
    Method,
    Projection,
    Setting,
    Stage,
    Tensors,
    Terms,
    combinations,
)

_ADAM_EPSILON = 1e-4


@dataclass(frozen=True, kw_only=True)
class ProLip(Method):
    """ProLIP, and RLA with `on_embeddings`; the learning rate and λ are chosen."""

    on_embeddings: bool = False
    learning_rates: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
    penalties: tuple[float, ...] = (10.0, 1.0, 0.1, 0.01, 0.001, 1e-4, 0.0)
    """candidates for λ·K, so that a fold of fewer images has the penalty that suits it"""
    learning_rate: float = 1e-4
    """where nothing is chosen; the authors name several"""
    steps: int = 300

    @property
    def defaults(self) -> Setting:
        """The validation-free form: λ = 1/K."""
        return {"alpha": 1.0, "learning_rate": self.learning_rate, "penalty": 1.0}

    @property
    def stages(self) -> Sequence[Stage]:
        """The learning rates and penalties together."""
        return [Stage(combinations(learning_rate=self.learning_rates, penalty=self.penalties))]

    def lacks(self, given: Given) -> str | None:
        """ProLIP needs what comes before the projection."""
        if given.projection or self.on_embeddings:
            return None
        return (
            "ProLIP needs CLIP's features before its last projection, and the projection; encode them, or take RLA, "
            "which needs embeddings alone"
        )

    def fit(self, images: FewShotImages, seed: int) -> Projections:
        """Prepare; each setting is trained when it is first used."""
        if self.on_embeddings:
            width = len(images.classifier)
            return Projections(self, images, Projection(torch.eye(width)))
        assert images.projection is not None
        return Projections(self, images, images.projection)

    def restore(self, tensors: Tensors, setting: Setting) -> Projected:
        """Return the projection of one setting."""
        return Projected(self.on_embeddings, tensors["text"], Projection(tensors["weight"], tensors.get("bias")))


class Projected:
    """The projection of one setting, which is trained, and the text."""

    def __init__(self, on_embeddings: bool, text: Tensor, projection: Projection) -> None:
        """Take whether unit embeddings are projected, the text (N, C) and the projection."""
        self.on_embeddings, self.text, self.projection = on_embeddings, text, projection

    def tensors(self, setting: Setting) -> Tensors:
        """Return the text, W and b."""
        bias = {} if self.projection.bias is None else {"bias": self.projection.bias}
        return {"text": self.text, "weight": self.projection.weight, **bias}

    def terms(self, features: Features) -> Callable[[Setting], Terms]:
        """Return 100 unit(z) Tᵀ, and the term 0."""
        logits = project(read(features, self.on_embeddings), self.projection, self.text)
        return lambda setting: Terms(logits, torch.zeros_like(logits))


def read(features: Features, on_embeddings: bool) -> Tensor:
    """Return what is projected of images: their unit embeddings (B, C), or what comes before the projection (B, E)."""
    if on_embeddings:
        return features.unit
    assert features.unprojected is not None
    return features.unprojected.float()


def project(inputs: Tensor, projection: Projection, text: Tensor) -> Tensor:
    """Return 100 unit(z) Tᵀ: (B, E), (N, C) → (B, N)."""
    bias = None if projection.bias is None else projection.bias.float()
    return 100 * F.normalize(F.linear(inputs, projection.weight, bias), dim=-1) @ text.T


class Projections:
    """The projection trained at each setting."""

    def __init__(self, method: ProLip, images: FewShotImages, start: Projection) -> None:
        """Take the training images and the pretrained projection."""
        self.method, self.images, self.start = method, images, start
        self.inputs = read(images.views, method.on_embeddings)  # (V, M, E)
        self.text = images.text.contiguous()
        self._trained: dict[tuple[float, float], Tensor] = {}

    def weight(self, learning_rate: float, penalty: float) -> Tensor:
        """Return W, (C, E), trained at a learning rate and λ = penalty / K."""
        if (learning_rate, penalty) not in self._trained:
            per_class = len(self.images.labels) / self.images.num_classes
            self._trained[learning_rate, penalty] = self._train(learning_rate, penalty / per_class)
        return self._trained[learning_rate, penalty]

    @torch.enable_grad()
    def _train(self, lr: float, penalty: float) -> Tensor:
        pretrained = self.start.weight.float()
        weight = pretrained.clone().requires_grad_()
        optimizer = torch.optim.Adam([weight], lr=lr, eps=_ADAM_EPSILON)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.method.steps)
        for step in range(self.method.steps):
            view = self.inputs[(step + 1) % len(self.inputs)]
            logits = project(view, self.start._replace(weight=weight), self.text)
            loss = F.cross_entropy(logits, self.images.labels)
            loss = loss + penalty * (weight - pretrained).square().sum()
            check_finite(loss, f"step {step + 1}", lr)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        return weight.detach()

    def at(self, setting: Setting) -> Projected:
        """Return the projection of one setting, which has `learning_rate` and `penalty`."""
        weight = self.weight(setting["learning_rate"], setting["penalty"])
        return Projected(self.method.on_embeddings, self.text, self.start._replace(weight=weight))

    def tensors(self, setting: Setting) -> Tensors:
        """Return the text, and W and b of the setting."""
        return self.at(setting).tensors(setting)

    def terms(self, features: Features) -> Callable[[Setting], Terms]:
        """Return 100 unit(z) Tᵀ, and the term 0."""
        return lambda setting: self.at(setting).terms(features)(setting)
