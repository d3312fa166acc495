"""The cache: few-shot and generated images as keys, their classes as values, and the keys' training.

CaFo (arXiv 2303.02151), section 3.3:

    F_s  = normalise(mean over views of f_s)        keys of source s, one row per image                  (eq. 3-5)
    φ(x) = exp(-β (1 - x))
    p_s  = φ(F_s f_sᵀ) summed over each class's keys                                                     (eq. 6-7)

The paper writes the last step as a product with one-hot values L; a one-hot product is a sum over classes, and is
done as one. Only the keys learn: the encoders are frozen, so a view's features never change and training needs
features alone.

Legend: M keys, B images, N classes, V views, C width of a source's features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from cafo.ensemble import Combination, Ensemble, combine
from cafo.errors import CafoError
from cafo.files import atomic_path

FORMAT = "cafo-cache-1"

_ROWS_AT_ONCE = 2048


@dataclass(frozen=True, kw_only=True, eq=False)
class Cache:
    """Everything one classifier needs besides the encoders.

    Raises:
        ValueError: shapes that do not fit each other, a label outside the class list, a zero-shot source without keys.
    """

    keys: Mapping[str, Tensor]
    """source name → (M, C) float32"""
    labels: Tensor
    """(M,) int64: the class of each key"""
    classifier: Tensor
    """(C, N) float32: CLIP's zero-shot weights W"""
    class_names: tuple[str, ...]
    """N names; the width of every prediction comes from here, never from the labels"""
    zero_shot_source: str = "clip"
    """the source whose features W reads"""
    encoders: Mapping[str, str] = field(default_factory=dict)
    """source name → identity of the encoder that made its keys"""
    alpha: float = 1.0
    beta: float = 5.5
    ensemble: Ensemble = field(default_factory=Ensemble)

    def __post_init__(self) -> None:
        entries = len(self.labels)
        if wrong := {name: tuple(k.shape) for name, k in self.keys.items() if k.ndim != 2 or len(k) != entries}:
            raise CafoError(f"{entries} labels need keys of shape ({entries}, C), got {wrong}")
        if entries and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.class_names):
            raise CafoError(
                f"labels run from {int(self.labels.min())} to {int(self.labels.max())}, "
                f"but the class list has {len(self.class_names)} names"
            )
        if self.classifier.ndim != 2 or self.classifier.shape[1] != len(self.class_names):
            raise CafoError(
                f"a classifier for {len(self.class_names)} classes has shape (C, {len(self.class_names)}), "
                f"got {tuple(self.classifier.shape)}"
            )

    def affinities(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """F_s f_sᵀ for every source: {name: (M, B)} from {name: (B, C)}."""
        if missing := set(self.keys) - set(features):
            raise CafoError(f"the cache needs features of {', '.join(sorted(missing))}, which were not given")
        return {name: affinity(keys, features[name]) for name, keys in self.keys.items()}

    def zero_shot(self, features: Mapping[str, Tensor]) -> Tensor:
        """p_ZS = 100 f W: (B, N)."""
        return zero_shot_logits(features[self.zero_shot_source], self.classifier)

    def combine(self, features: Mapping[str, Tensor]) -> Combination:
        """Eq. 3-9 at the cache's β and ensemble, before α: each part (B, N)."""
        predictions = {
            name: class_logits(a, self.labels, len(self.class_names), self.beta)
            for name, a in self.affinities(features).items()
        }
        return combine(self.zero_shot(features), predictions, self.ensemble)

    @torch.no_grad()
    def combined(self, features: Mapping[str, Tensor]) -> Combination:
        """`combine` for any number of images: some rows at a time, and without gradients."""
        rows = max(len(features[self.zero_shot_source]), 1)
        blocks = [slice(i, i + _ROWS_AT_ONCE) for i in range(0, rows, _ROWS_AT_ONCE)]
        parts = [self.combine({n: f[block] for n, f in features.items()}) for block in blocks]
        base, term, shares = (torch.cat([part[i] for part in parts]) for i in range(3))  # type: ignore[misc]
        return Combination(base, term, shares, parts[0].sources)

    def logits(self, features: Mapping[str, Tensor]) -> Tensor:
        """The CaFo prediction (B, N) at the cache's α, β and ensemble, without gradients."""
        return self.combined(features).logits(self.alpha)


def mean_key(views: Tensor) -> Tensor:
    """Keys from V views' features: (V, M, C) → (M, C), averaged over views, then unit-norm (section 3.3)."""
    return F.normalize(views.float().mean(dim=0), dim=-1)


def affinity(keys: Tensor, features: Tensor) -> Tensor:
    """F fᵀ: (M, B), a row per key, so that a class sum adds whole rows. Always float32: β multiplies its error."""
    return keys.float() @ features.float().T


def zero_shot_logits(features: Tensor, classifier: Tensor) -> Tensor:
    """p_ZS = 100 f W: (B, C), (C, N) → (B, N)."""
    return 100.0 * features.float() @ classifier.float()


def class_logits(affinity: Tensor, labels: Tensor, num_classes: int, beta: float) -> Tensor:
    """Eq. 6-7, p = φ(F fᵀ) L, up to a factor per image: (M, B) → (B, N).

    φ is taken relative to the image's nearest key, exp(-β (max - x)): at large β the paper's form underflows to zeros
    for an image far from every key, and z(p) of eq. 8, the only use of p, does not see a factor per image.
    """
    if not len(affinity):  # K = 0 and nothing generated: no evidence for any class
        return affinity.new_zeros(affinity.shape[1], num_classes)
    nearest = affinity.detach().amax(dim=0)
    phi = torch.exp(beta * (affinity - nearest))
    return phi.new_zeros(num_classes, affinity.shape[1]).index_add(0, labels, phi).T


@dataclass(frozen=True, kw_only=True)
class KeyTraining:
    """The paper's recipe (section 4.1)."""

    epochs: int = 20
    batch: int = 256
    lr: float = 1e-3
    eps: float = 1e-4
    weight_decay: float = 0.01
    seed: int = 0
    """order of the images in each epoch"""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One line of progress; epoch 0 is the cache before training."""

    epoch: int
    loss: float
    """mean cross-entropy over the epoch's images; NaN at epoch 0"""
    val_accuracy: float
    """share of validation images, at the initial α and β"""


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose first largest logit is their label's: (B, N), (B,)."""
    return int((logits.argmax(dim=-1) == labels).sum()) / max(len(labels), 1)


def train_keys(
    cache: Cache,
    views: Mapping[str, Tensor],
    labels: Tensor,
    val_features: Mapping[str, Tensor],
    val_labels: Tensor,
    training: KeyTraining,
    report: Callable[[Epoch], None] = lambda epoch: None,
) -> tuple[Cache, Epoch]:
    """Fine-tune the keys by cross-entropy on the ensembled logits at the cache's α and β (section 3.3).

    Epoch e passes once over the images with their view e mod V; the cosine runs over all steps, so the learning rate
    falls to zero exactly at the last. The keys with the best validation accuracy are kept, the earliest on ties, and
    the untrained keys compete too. Test plays no part.

    Args:
        cache: the start; it is left as it is.
        views: {source: (V, M', C)} unit features of the training images, V the same for all sources.
        labels: (M',) int64.
        val_features, val_labels: {source: (B, C)} and (B,).
        report: called after every epoch; an exception from it ends the training.

    Returns:
        The cache with the best keys, and the epoch they come from.

    Raises:
        ValueError: no images, or a loss that is not finite (with its step and learning rate).
    """
    num_views, images = next(iter(views.values())).shape[:2]
    if not images or not num_views:
        raise CafoError("training the keys needs at least one image and one view of it")
    keys = {name: k.detach().clone().requires_grad_() for name, k in cache.keys.items()}
    learner = replace(cache, keys=keys)
    optimizer = torch.optim.AdamW(keys.values(), lr=training.lr, eps=training.eps, weight_decay=training.weight_decay)
    steps = training.epochs * -(-images // training.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    order = torch.Generator().manual_seed(training.seed)

    best = Epoch(epoch=0, loss=float("nan"), val_accuracy=accuracy(learner.logits(val_features), val_labels))
    best_keys = {name: k.detach().clone() for name, k in keys.items()}
    report(best)
    for epoch in range(1, training.epochs + 1):
        total = 0.0
        for step, rows in enumerate(torch.randperm(images, generator=order).split(training.batch)):
            rows = rows.to(labels.device)
            batch = {name: v[(epoch - 1) % num_views, rows] for name, v in views.items()}
            loss = F.cross_entropy(learner.combine(batch).logits(cache.alpha), labels[rows])
            if not torch.isfinite(loss):
                raise CafoError(
                    f"the loss is {loss.item()} at epoch {epoch}, step {step + 1} (images {rows[:5].tolist()}…, "
                    f"learning rate {schedule.get_last_lr()[0]:.3g}); lower the learning rate or check the features"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        current = Epoch(
            epoch=epoch, loss=total / images, val_accuracy=accuracy(learner.logits(val_features), val_labels)
        )
        if current.val_accuracy > best.val_accuracy:
            best, best_keys = current, {name: k.detach().clone() for name, k in keys.items()}
        report(current)
    return replace(cache, keys=best_keys), best


def save_cache(cache: Cache, path: str | Path) -> None:
    """Write `cache.safetensors`: keys, labels and W as tensors, everything else in the header. Whole or not at all."""
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
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, header)


def load_cache(path: str | Path) -> Cache:
    """Read what `save_cache` wrote.

    Raises:
        ValueError: the file is missing, or is not a cache of this format.
    """
    if not Path(path).is_file():
        raise CafoError(f"no cache at {path}; train one first")
    with safe_open(str(path), "pt") as file:
        header = file.metadata() or {}
        if header.get("format") != FORMAT:
            raise CafoError(f"{path} is not a {FORMAT} file (its header says {header.get('format')!r})")
        # copied, since a product's last bits may depend on where in memory its factors begin
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    ensemble = json.loads(header["ensemble"])
    if ensemble["sources"] is not None:
        ensemble["sources"] = tuple(ensemble["sources"])
    return Cache(
        keys={name.removeprefix("keys."): t for name, t in tensors.items() if name.startswith("keys.")},
        labels=tensors["labels"],
        classifier=tensors["classifier"],
        class_names=tuple(json.loads(header["class_names"])),
        zero_shot_source=header["zero_shot_source"],
        encoders=json.loads(header["encoders"]),
        alpha=float(header["alpha"]),
        beta=float(header["beta"]),
        ensemble=Ensemble(**ensemble),
    )
