"""The one interface of few-shot methods: what they are fitted on, and what they give.

A method is fitted on features of labelled images and a text classifier. What it gives has, for any other images, logits
of the form

    base + α · term

in which base and term depend on the method's other hyperparameters, its setting. A method without α has the term 0.
`cafo.methods.choice` chooses the setting and α in the same way for all methods.

Legend: M training images, B images, N classes, V views, P sentences of a class, C width of an embedding, E width before
the encoder's last projection.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from cafo.cache import mean_key, zero_shot_logits
from cafo.errors import CafoError

Setting = Mapping[str, float]
"""Hyperparameter → value. `alpha` is the weight of the term."""


Tensors = Mapping[str, Tensor]
"""Name → tensor."""


class Terms(NamedTuple):
    """The logits of images before α is applied."""

    base: Tensor
    """(B, N)"""
    term: Tensor
    """(B, N)"""

    def logits(self, alpha: float) -> Tensor:
        """Return the logits: (B, N)."""
        return self.base + alpha * self.term


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """Features of images, with any dimensions before the last two."""

    embeddings: Tensor
    """(…, B, C), raw or of unit length"""
    unprojected: Tensor | None = None
    """(…, B, E): what the encoder's last projection makes the embeddings of; None if they were not stored"""

    @property
    def unit(self) -> Tensor:
        """The embeddings scaled to unit length, float32."""
        return F.normalize(self.embeddings.float(), dim=-1)

    def rows(self, rows: Tensor) -> Features:
        """Return the features of some of the images."""
        unprojected = None if self.unprojected is None else self.unprojected[..., rows, :]
        return Features(embeddings=self.embeddings[..., rows, :], unprojected=unprojected)


class Projection(NamedTuple):
    """The last layer of CLIP's image encoder: embedding = weight · x + bias."""

    weight: Tensor
    """(C, E)"""
    bias: Tensor | None = None
    """(C,)"""


class Given(NamedTuple):
    """The parts of a data set, which are known before any image is encoded."""

    shots: int
    """training images of the class that has the fewest"""
    views: int
    prompts: bool
    """whether each sentence's embedding is given, not their mean alone"""
    projection: bool
    """whether features before the encoder's last projection are stored"""


@dataclass(frozen=True, kw_only=True, eq=False)
class FewShotImages:
    """Labelled images and the text classifier: all that a method is fitted on.

    Raises:
        CafoError: shapes that do not fit, or a class without an image.
    """

    views: Features
    """(V, M, …) of augmented views"""
    plain: Features
    """(M, …) of the images as they are, like those that will be classified"""
    labels: Tensor
    """(M,) int64"""
    classifier: Tensor
    """(C, N): the zero-shot classifier, one unit column for each class"""
    prompts: Tensor | None = None
    """(N, P, C): unit embeddings of each class's sentences"""
    projection: Projection | None = None

    def __post_init__(self) -> None:
        images, width = self.plain.embeddings.shape
        if self.views.embeddings.shape[1:] != (images, width) or self.labels.shape != (images,):
            raise CafoError(
                f"{images} images of width {width} need views (V, {images}, {width}) and {images} labels, got "
                f"{tuple(self.views.embeddings.shape)} and {tuple(self.labels.shape)}"
            )
        if len(self.classifier) != width:
            raise CafoError(f"features of width {width} need a classifier of as many rows, got {len(self.classifier)}")
        counts = torch.bincount(self.labels, minlength=self.num_classes)
        if len(counts) > self.num_classes:
            raise CafoError(f"a label is {len(counts) - 1}, but the classifier has {self.num_classes} classes")
        if empty := (counts == 0).nonzero()[:, 0].tolist():
            raise CafoError(f"classes {empty[:5]} have no training image; give each class at least one")

    @property
    def num_classes(self) -> int:
        """N."""
        return self.classifier.shape[1]

    @property
    def text(self) -> Tensor:
        """T = Wᵀ, (N, C): one unit row for each class."""
        return self.classifier.float().T

    @property
    def keys(self) -> Tensor:
        """G: the mean of each image's views, scaled to unit length, (M, C)."""
        return mean_key(self.views.embeddings)

    @property
    def samples(self) -> tuple[Tensor, Tensor]:
        """Each view of each image as a sample of its own: unit features (V·M, C) and labels (V·M,)."""
        views = self.views.unit
        return views.flatten(0, 1), self.labels.repeat(len(views))

    @property
    def given(self) -> Given:
        """The parts that there are, by which a method says what it lacks."""
        shots = int(torch.bincount(self.labels, minlength=self.num_classes).min())
        return Given(shots, len(self.views.embeddings), self.prompts is not None, self.projection is not None)

    def rows(self, rows: Tensor) -> FewShotImages:
        """Return some of the images, as if the others had never been there."""
        return replace(self, views=self.views.rows(rows), plain=self.plain.rows(rows), labels=self.labels[rows])

    def zero_shot(self, features: Features) -> Tensor:
        """Return 100 f Tᵀ: (B, N)."""
        return zero_shot_logits(features.unit, self.classifier)


class Stage(NamedTuple):
    """Candidates for some hyperparameters; those of later stages keep their defaults meanwhile."""

    settings: Sequence[Setting]
    """values of all hyperparameters but α"""
    alphas: Sequence[float] = (1.0,)
    """values of α, each tried with each setting"""


class Fitted(Protocol):
    """A method that has been fitted, at all of its settings."""

    def terms(self, features: Features) -> Callable[[Setting], Terms]:
        """Return the logits of images as a function of the setting.

        What several settings share is computed once if they follow each other.

        Args:
            features: of B images.
        """

    def tensors(self, setting: Setting) -> Tensors:
        """Return all that `terms` reads at one setting, from which `Method.restore` makes it again."""


class Method(Protocol):
    """A few-shot method and its grid of hyperparameters: a frozen dataclass of the author's constants."""

    @property
    def constants(self) -> dict[str, Any]:
        """The constants by name, as plain values."""
        method: Any = self
        return asdict(method)

    @property
    def defaults(self) -> Setting:
        """The setting, with α, where nothing is chosen."""

    @property
    def stages(self) -> Sequence[Stage]:
        """The hyperparameters to choose, one stage after the other."""

    def fit(self, images: FewShotImages, seed: int) -> Fitted:
        """Fit the method on labelled images.

        Args:
            images: the training images.
            seed: seed of whatever is random, such as the order of the images.
        """

    def restore(self, tensors: Tensors, setting: Setting) -> Fitted:
        """Return what has given `tensors` at a setting; it knows this setting alone.

        Raises:
            KeyError: a tensor is missing.
        """

    def lacks(self, given: Given) -> str | None:
        """Return what the method needs and a data set does not have, and what to do; None if it has everything."""
        return None


def reads_unprojected(method: Method) -> bool:
    """Return whether a method reads what comes before the encoder's last projection, and nothing else of an image."""
    enough = Given(shots=2, views=2, prompts=True, projection=True)
    return method.lacks(enough) is None and method.lacks(enough._replace(projection=False)) is not None


def class_sums(rows: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Sum rows over each class's images, as a product with one-hot values would: (M, B), (M,) → (B, N)."""
    return rows.new_zeros(num_classes, rows.shape[1]).index_add(0, labels, rows).T


def class_means(rows: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the mean row of each class, not renormalised: (M, C), (M,) → (N, C)."""
    counts = torch.bincount(labels, minlength=num_classes).to(rows.dtype)
    return class_sums(rows, labels, num_classes).T / counts[:, None]


def powers_of_ten(low: int, high: int) -> list[float]:
    """Return 10^low, …, 10^high."""
    return [10.0**power for power in range(low, high + 1)]


def combinations(**values: Sequence[float]) -> list[Setting]:
    """Return every combination of hyperparameters' values; the first name varies slowest."""
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]
