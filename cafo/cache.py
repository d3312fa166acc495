"""The key-value cache of features of labelled images.

CaFo (arXiv 2303.02151), section 3.3:

The keys are features of the few-shot and generated images, the values their classes:

    F_s  = normalise(mean over views of f_s)        keys of source s, one row per image                  (eq. 3-5)
    φ(x) = exp(-β (1 - x))
    p_s  = φ(F_s f_sᵀ) summed over each class's keys                                                     (eq. 6-7)

The paper writes the last step as a product with one-hot values L. That product is a sum over each class's keys, and is
computed as one. Only the keys are trained, by `cafo.key_training`.

Legend: M keys, B images, N classes, V views, C width of a source's features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from cafo.calibration import Calibration
from cafo.ensemble import Combination, Ensemble, combine
from cafo.errors import CafoError
from cafo.files import atomic_path
from cafo.tensor_file import read_tensor_file

FORMAT = "cafo-cache-1"

_ROWS_AT_ONCE, _AFFINITIES_AT_ONCE = 2048, 1 << 23
"""images that are predicted together, and affinities of each source: fewer images where there are many keys"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cache:
    """Everything that a classifier needs besides the encoders.

    Raises:
        CafoError: shapes that do not fit each other, a label outside the class list, a zero-shot source without keys.
    """

    keys: Mapping[str, Tensor]
    """source name → (M, C) float32"""
    labels: Tensor
    """(M,) int64: the class of each key"""
    classifier: Tensor
    """(C, N) float32: CLIP's zero-shot weights W"""
    class_names: tuple[str, ...]
    """the N classes; every prediction has N columns, whatever labels occur"""
    zero_shot_source: str = "clip"
    """the source whose features are multiplied with W"""
    encoders: Mapping[str, str] = field(default_factory=dict)
    """source name → identity of the encoder that made its keys"""
    alpha: float = 1.0
    beta: float = 5.5
    ensemble: Ensemble = field(default_factory=Ensemble)
    calibration: Calibration | None = None
    """from held-out images at these α, β and ensemble; None if there were none"""
    key_names: tuple[str, ...] = ()
    """(M,) the keys' images by name, such as the path below the data set's folder; empty if they are not known"""

    def __post_init__(self) -> None:
        entries = len(self.labels)
        if wrong := {name: tuple(k.shape) for name, k in self.keys.items() if k.ndim != 2 or len(k) != entries}:
            raise CafoError(f"{entries} labels need keys of shape ({entries}, C), got {wrong}")
        if entries and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.class_names):
            raise CafoError(
                f"labels run from {int(self.labels.min())} to {int(self.labels.max())}, "
                f"but the class list has {len(self.class_names)} names"
            )
        if self.key_names and len(self.key_names) != entries:
            raise CafoError(f"{entries} keys need {entries} names of images or none, got {len(self.key_names)}")
        if self.classifier.ndim != 2 or self.classifier.shape[1] != len(self.class_names):
            raise CafoError(
                f"a classifier for {len(self.class_names)} classes has shape (C, {len(self.class_names)}), "
                f"got {tuple(self.classifier.shape)}"
            )

    def affinities(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return F_s f_sᵀ for every source: {name: (B, C)} → {name: (M, B)}.

        Raises:
            CafoError: features of a source are missing.
        """
        self.require(features)
        return {name: affinity(keys, features[name]) for name, keys in self.keys.items()}

    def require(self, features: Mapping[str, Tensor]) -> None:
        """Raise CafoError if features of a source are missing."""
        if missing := {*self.keys, self.zero_shot_source} - set(features):
            raise CafoError(f"the cache needs features of {', '.join(sorted(missing))}, which were not given")

    def zero_shot(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return p_ZS = 100 f W: (B, N)."""
        return zero_shot_logits(features[self.zero_shot_source], self.classifier)

    def combine(self, features: Mapping[str, Tensor]) -> Combination:
        """Return eq. 3-9 at the cache's β and ensemble, before α is applied: each part (B, N)."""
        affinities = self.affinities(features)
        return combine_affinities(self.zero_shot(features), affinities, self.labels, self.beta, self.ensemble)

    @torch.no_grad()
    def combine_in_blocks(self, features: Mapping[str, Tensor]) -> Combination:
        """Return `combine` for any number of images, block by block and without gradients."""
        self.require(features)
        rows = max(len(features[self.zero_shot_source]), 1)
        size = max(1, min(_ROWS_AT_ONCE, _AFFINITIES_AT_ONCE // max(len(self.labels), 1)))
        blocks = [slice(i, i + size) for i in range(0, rows, size)]
        parts = [self.combine({n: f[block] for n, f in features.items()}) for block in blocks]
        return Combination(
            torch.cat([part.base for part in parts]),
            torch.cat([part.term for part in parts]),
            torch.cat([part.shares for part in parts]),
            parts[0].sources,
        )

    def logits(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of eq. 9, (B, N), at the cache's α, β and ensemble, without gradients."""
        return self.combine_in_blocks(features).logits(self.alpha)


def mean_key(views: Tensor) -> Tensor:
    """Average features over V views and scale them to unit norm (section 3.3): (V, M, C) → keys (M, C)."""
    return F.normalize(views.float().mean(dim=0), dim=-1)


def affinity(keys: Tensor, features: Tensor) -> Tensor:
    """Return F fᵀ, (M, B): one row for each key, so that the sum over a class adds whole rows.

    It is computed in float32 whatever the features' type, since β multiplies its error.

    Args:
        keys: (M, C).
        features: (B, C).
    """
    return keys.float() @ features.float().T


def zero_shot_logits(features: Tensor, classifier: Tensor) -> Tensor:
    """Return p_ZS = 100 f W: (B, C), (C, N) → (B, N)."""
    return 100.0 * features.float() @ classifier.float()


def nearest_affinity(affinity: Tensor) -> Tensor:
    """Return each image's largest affinity, without gradient; 0 where all keys are left out: (M, B) → (B,)."""
    nearest = affinity.detach().amax(dim=0)
    return nearest.where(nearest > -torch.inf, 0.0)


def class_logits(affinity: Tensor, labels: Tensor, num_classes: int, beta: float) -> Tensor:
    """Return p = φ(F fᵀ) L of eq. 6-7, up to a factor per image: (M, B) → (B, N).

    φ is computed relative to the image's nearest key, exp(-β (max - x)). At large β the paper's form underflows to
    zeros for an image far from every key. The factor per image does not matter: p is used only in z(p) of eq. 8, which
    divides by its standard deviation. An affinity of -inf leaves a key out for an image: its φ is 0.
    """
    if not len(affinity):  # K = 0 and no generated images: no evidence for any class
        return affinity.new_zeros(affinity.shape[1], num_classes)
    nearest = nearest_affinity(affinity)
    phi = torch.exp(beta * (affinity - nearest))
    return phi.new_zeros(num_classes, affinity.shape[1]).index_add(0, labels, phi).T


def combine_affinities(
    zero_shot: Tensor, affinities: Mapping[str, Tensor], key_labels: Tensor, beta: float, ensemble: Ensemble
) -> Combination:
    """Return eq. 6-9 at one β and ensemble, before α is applied: each part (B, N).

    Args:
        zero_shot: p_ZS, (B, N).
        affinities: {source: (M, B)}.
        key_labels: (M,) int64.
        beta, ensemble: the values.
    """
    classes = zero_shot.shape[1]
    predictions = {name: class_logits(a, key_labels, classes, beta) for name, a in affinities.items()}
    return combine(zero_shot, predictions, ensemble)


def count_correct(logits: Tensor, labels: Tensor) -> int:
    """Return the number of images whose (first) largest logit is their label's: (B, N), (B,)."""
    return int((logits.argmax(dim=-1) == labels).sum())


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of images that are correct: (B, N), (B,)."""
    return count_correct(logits, labels) / max(len(labels), 1)


def save_cache(cache: Cache, path: str | Path) -> None:
    """Write a cache atomically as safetensors: keys, labels and W as tensors, everything else in the header."""
    tensors = {f"keys.{name}": k.detach().float().cpu().contiguous() for name, k in cache.keys.items()}
    tensors |= {"labels": cache.labels.cpu(), "classifier": cache.classifier.float().cpu().contiguous()}
    header = {
        "format": FORMAT,
        "class_names": json.dumps(cache.class_names),
        "zero_shot_source": cache.zero_shot_source,
        "encoders": json.dumps(dict(cache.encoders)),
        "alpha": repr(cache.alpha),
        "beta": repr(cache.beta),
        "ensemble": json.dumps(asdict(cache.ensemble)),
    }
    if cache.key_names:
        header["key_names"] = json.dumps(cache.key_names)
    if cache.calibration is not None:
        tensors["held_out_scores"] = cache.calibration.scores.cpu().contiguous()
        header["temperature"] = repr(cache.calibration.temperature)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, header)


def load_cache(path: str | Path) -> Cache:
    """Read a cache that `save_cache` wrote.

    Raises:
        CafoError: the file is missing, cut short, a Git LFS pointer, or not a cache of this format, or its tensors hold
            NaN or infinity.
    """
    return read_tensor_file(path, FORMAT, _build_cache, content="cache", make="train")


_TEXTS, _TEXT_BY_NAME = TypeAdapter(tuple[str, ...]), TypeAdapter(dict[str, str])
_ENSEMBLE = TypeAdapter(Ensemble)


def _build_cache(header: Mapping[str, str], tensors: dict[str, Tensor]) -> Cache:
    calibration = None
    if "temperature" in header:
        calibration = Calibration(temperature=float(header["temperature"]), scores=tensors["held_out_scores"])
    return Cache(
        keys={name.removeprefix("keys."): t for name, t in tensors.items() if name.startswith("keys.")},
        labels=tensors["labels"],
        classifier=tensors["classifier"],
        class_names=_TEXTS.validate_json(header["class_names"]),
        zero_shot_source=header["zero_shot_source"],
        encoders=_TEXT_BY_NAME.validate_json(header["encoders"]),
        alpha=float(header["alpha"]),
        beta=float(header["beta"]),
        ensemble=_ENSEMBLE.validate_json(header["ensemble"]),
        calibration=calibration,
        key_names=_TEXTS.validate_json(header.get("key_names", "[]")),
    )
