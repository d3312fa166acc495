"""TIMO: sentences weighted by image prototypes, and added to the samples of GDA.

Li et al., "Text and Image Are Mutually Beneficial: Enhancing Training-Free Few-Shot Classification with CLIP" (AAAI
2025, arXiv 2412.11375). With E_cp the unit embedding of sentence p of class c and s_c the unit mean of its keys:

    m_cp = s_c·E_cp
    T̂_c  = unit( Σ_p softmax_p(γ · m_c / ‖m_c‖) E_cp )                        sentences guided by images
    logits(f) = α · f·T̂ᵀ + (f·w + b)                                         (no factor 100)

w and b are GDA's on all views of all images together with B sentences of each class, those with the largest m first and
beginning again after P, each as the sample m_cp E_cp.

TIMO has γ fixed and B = P; TIMO-S chooses γ by the accuracy of T̂ alone, then B and α together. The authors set γ by
the data set's name; the default is theirs for most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cafo.methods.base import (
    Features,
    FewShotImages,
    Given,
    Method,
    Setting,
    Stage,
    Tensors,
    Terms,
    class_means,
    combinations,
    powers_of_ten,
)
from cafo.methods.gda import discriminant

_ROUNDING = 1e-9
"""what a whole number may be too small by, before it is rounded down"""


@dataclass(frozen=True, kw_only=True)
class Timo(Method):
    """TIMO, and TIMO-S with `searched`."""

    gamma: float = 50.0
    searched: bool = False
    """choose γ and the number of sentences, as TIMO-S does"""

    @property
    def defaults(self) -> Setting:
        """γ, every sentence once, and the zero-shot classifier's factor 100 as α."""
        return {"alpha": 100.0, "gamma": self.gamma, "sentences": 1.0, "images": 1.0}

    @property
    def stages(self) -> Sequence[Stage]:
        """The authors' grids. `sentences` is B: 1 at 0, P at 1, 2 P at 2. With `images` 0, T̂ is alone."""
        alphas = powers_of_ten(-4, 4)
        if not self.searched:
            return [Stage([{}], alphas)]
        gammas = [5.0 * i for i in range(1, 21)]
        shares = torch.linspace(0, 2, 10).tolist()
        return [
            Stage(combinations(gamma=gammas, images=[0.0])),
            Stage(combinations(sentences=shares, images=[1.0]), alphas),
        ]

    def lacks(self, given: Given) -> str | None:
        """Each sentence's embedding is needed."""
        if given.prompts:
            return None
        return "TIMO needs the embedding of each sentence of a class, not their mean alone; give class descriptions"

    def fit(self, images: FewShotImages, seed: int) -> GuidedText:
        """Measure how well each sentence fits its class's images."""
        assert images.prompts is not None
        return GuidedText(images, images.prompts.float())

    def restore(self, tensors: Tensors, setting: Setting) -> TextAndDiscriminant:
        """Return the guided text and the discriminant of one setting."""
        return TextAndDiscriminant(tensors["text"], tensors["weights"], tensors["biases"])


class TextAndDiscriminant:
    """The guided text and the discriminant of one setting."""

    def __init__(self, text: Tensor, weights: Tensor, biases: Tensor) -> None:
        """Take T̂ (N, C), weights (N, C) and biases (N,)."""
        self.text, self.weights, self.biases = text, weights, biases

    def tensors(self, setting: Setting) -> Tensors:
        """Return T̂, w and b."""
        return dict(vars(self))

    def terms(self, features: Features) -> Callable[[Setting], Terms]:
        """Return f·w + b and f·T̂ᵀ."""
        unit = features.unit
        terms = Terms(unit @ self.weights.T + self.biases, unit @ self.text.T)
        return lambda setting: terms


class GuidedText:
    """The sentences of each class with their fit, and discriminants for several numbers of them."""

    def __init__(self, images: FewShotImages, prompts: Tensor) -> None:
        """Take the training images and sentences (N, P, C)."""
        self.images, self.prompts = images, prompts
        prototypes = F.normalize(class_means(images.keys, images.labels, images.num_classes), dim=-1)
        self.fits = (prompts * prototypes[:, None]).sum(dim=-1)  # m, (N, P)
        self._discriminants: dict[int, tuple[Tensor, Tensor]] = {}

    def text(self, gamma: float) -> Tensor:
        """Return T̂, (N, C)."""
        shares = (gamma * F.normalize(self.fits, dim=-1)).softmax(dim=-1)
        return F.normalize((shares[..., None] * self.prompts).sum(dim=1), dim=-1)

    def discriminant(self, sentences: int) -> tuple[Tensor, Tensor]:
        """Return GDA's weights (N, C) and biases (N,) with B sentences of each class among the samples."""
        if sentences not in self._discriminants:
            classes, each, width = self.prompts.shape
            order = self.fits.argsort(dim=1, descending=True, stable=True)
            picked = order[:, torch.arange(sentences) % each]  # (N, B)
            samples = (self.fits[..., None] * self.prompts).gather(1, picked[..., None].expand(-1, -1, width))
            views, labels = self.images.samples
            everything = torch.cat([views, samples.flatten(0, 1)])
            labels = torch.cat([labels, torch.arange(classes).repeat_interleave(sentences)])
            self._discriminants[sentences] = discriminant(everything, labels, classes)
        return self._discriminants[sentences]

    def at(self, setting: Setting) -> TextAndDiscriminant:
        """Return the text and the discriminant of one setting, which has `gamma`, `sentences` and `images`."""
        text, each = self.text(setting["gamma"]), self.prompts.shape[1]
        if not setting["images"]:
            return TextAndDiscriminant(text, torch.zeros_like(text), text.new_zeros(len(text)))
        sentences = int(1 + setting["sentences"] / 2 * (2 * each - 1) + _ROUNDING)
        return TextAndDiscriminant(text, *self.discriminant(sentences))

    def tensors(self, setting: Setting) -> Tensors:
        """Return T̂, w and b of the setting."""
        return self.at(setting).tensors(setting)

    @torch.no_grad()
    def terms(self, features: Features) -> Callable[[Setting], Terms]:
        """Return f·w + b and f·T̂ᵀ."""
        return lambda setting: self.at(setting).terms(features)(setting)
