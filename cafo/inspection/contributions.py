"""Exact contributions of p_ZS and of every key to the logits of an image.

CaFo (arXiv 2303.02151), eq. 6-9. The prediction of a source is a sum over its keys, and z(p) subtracts the mean over
the N classes and divides by the standard deviation. So each key k of class l_k adds to the logit of class n

    v_k · g(n) · (1[l_k = n] - 1/N)    with    v_k = α · s_i · φ_k / std(p_i)

where g is the source's share of eq. 8. What is left is p_ZS, the text's part. The sum of all is the logit itself, not
an approximation. A key of class c therefore pulls c ahead of any other class by v_k · g, whatever else is in the cache.

The other ensembles of table 5 have the same form: for `average`, g is 1/S; for `maximum`, g(n) is 1 for the source that
is largest at class n and 0 for the others; a source that is the baseline has α = 1, and p_ZS then has a share.

Legend: M keys, B images, N classes, C width of a source's features, T sentences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cafo.cache import Cache, class_logits, nearest_affinity
from cafo.ensemble import NOTHING, ZERO_SHOT, Ensemble, combine, inverse_spread, standardise
from cafo.errors import CafoError

_FLOATS_AT_ONCE = 1 << 24
_SMALLEST_NORM = 1e-12  # that of torch.nn.functional.normalize


class Contributions(NamedTuple):
    """The parts of the logits of B images."""

    text: Tensor
    """(B, N): what p_ZS adds"""
    votes: Mapping[str, Tensor]
    """source → (M, B): v of each key"""
    gains: Mapping[str, Tensor]
    """source → (B, N): g, the share of the source at each class"""
    key_labels: Tensor
    """(M,) int64"""

    def logits(self) -> Tensor:
        """Return the sum of all contributions, the logits of eq. 9: (B, N)."""
        logits, classes = self.text, self.text.shape[1]
        for name, votes in self.votes.items():
            by_class = votes.new_zeros(classes, votes.shape[1]).index_add(0, self.key_labels, votes).T
            logits = logits + self.gains[name] * (by_class - votes.sum(dim=0)[:, None] / classes)
        return logits

    def pulls(self, label: Tensor, rival: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what adds to the logit of one class, less what it adds to that of another.

        Args:
            label, rival: (B,) int64, the two classes of each image.

        Returns:
            The text's part (B,), and source → (M, B): that of each key. Their sum is the difference of the logits.
        """
        classes, images = self.text.shape[1], torch.arange(len(self.text), device=self.text.device)
        text = self.text[images, label] - self.text[images, rival]
        pulls = {}
        for name, votes in self.votes.items():
            for_label, for_rival = (
                self.gains[name][images, of] * ((self.key_labels[:, None] == of).float() - 1 / classes)
                for of in (label, rival)
            )
            pulls[name] = votes * (for_label - for_rival)
        return text, pulls


class Vote(NamedTuple):
    """One key's part in a decision between two classes."""

    key: int
    """row of the cache's keys"""
    label: int
    """the key's class"""
    pull: float
    """what the key adds to the logit of the first class, less what it adds to that of the second, over all sources"""
    by_source: Mapping[str, float]
    """source → its part of the pull"""


class Explanation(NamedTuple):
    """The parts of the decision between the two most likely classes of an image.

    `text` and all of `sources` add up to `margin`, and so do `text`, the pulls of `votes`, and `others`.
    """

    label: int
    """the predicted class"""
    rival: int
    """the second most likely class"""
    margin: float
    """the difference of their logits"""
    text: float
    """p_ZS's part"""
    sources: Mapping[str, float]
    """source → the part of all its keys"""
    votes: tuple[Vote, ...]
    """the keys with the largest pulls either way, the largest first"""
    others: float
    """the part of all other keys"""


def decompose(
    zero_shot: Tensor,
    affinities: Mapping[str, Tensor],
    key_labels: Tensor,
    alpha: float,
    beta: float,
    ensemble: Ensemble,
) -> Contributions:
    """Return the contributions of eq. 6-9.

    Args:
        zero_shot: p_ZS, (B, N).
        affinities: {source: (M, B)}; -inf leaves a key out for an image.
        key_labels: (M,) int64.
        alpha, beta, ensemble: the values.

    Raises:
        CafoError: what `cafo.ensemble.combine` raises.
    """
    classes = zero_shot.shape[1]
    predictions = {name: class_logits(a, key_labels, classes, beta) for name, a in affinities.items()}
    combination = combine(zero_shot, predictions, ensemble)
    gains = {
        name: share[:, None].expand(-1, classes)
        for name, share in zip(combination.sources, combination.shares.T, strict=True)
    }
    if ensemble.rule == "maximum":
        scaled = [ensemble.scales.get(name, 1.0) * standardise(predictions[name]) for name in combination.sources]
        winner = torch.stack(scaled).argmax(dim=0)
        gains = {name: (winner == number).float() for number, name in enumerate(combination.sources)}
    text, votes = zero_shot, {}
    if ensemble.baseline == NOTHING:
        text = torch.zeros_like(zero_shot)
    elif ensemble.baseline != ZERO_SHOT:
        text = alpha * ensemble.scales.get(ZERO_SHOT, 1.0) * gains.pop(ZERO_SHOT) * standardise(zero_shot)
        gains[ensemble.baseline] = torch.ones_like(zero_shot)
    for name in gains:
        factor = 1.0 if name == ensemble.baseline else alpha * ensemble.scales.get(name, 1.0)
        phi = affinities[name]
        if len(phi):
            phi = torch.exp(beta * (phi - nearest_affinity(phi)))
        votes[name] = factor * phi * inverse_spread(predictions[name]).T
    return Contributions(text, votes, gains, key_labels)


def contributions_of_cache(cache: Cache, features: Mapping[str, Tensor]) -> Contributions:
    """Return the contributions to a cache's logits of some images: {source: (B, C)}.

    The result has M · B floats for each source; `explain` goes through any number of images in blocks.
    """
    return decompose(
        cache.zero_shot(features), cache.affinities(features), cache.labels, cache.alpha, cache.beta, cache.ensemble
    )


@torch.no_grad()
def explain(cache: Cache, features: Mapping[str, Tensor], votes: int = 8) -> Iterator[Explanation]:
    """Yield what decided the prediction of each image, block by block.

    Args:
        cache: the classifier.
        features: {source: (B, C)}.
        votes: the number of keys that are named for each image.

    Raises:
        CafoError: fewer than two classes, or features of a source are missing.
    """
    images = len(features[cache.zero_shot_source])
    rows = max(1, _FLOATS_AT_ONCE // max(1, len(cache.labels)))
    for start in range(0, images, rows):
        block = {name: f[start : start + rows] for name, f in features.items()}
        yield from explain_block(contributions_of_cache(cache, block), votes)


def explain_block(contributions: Contributions, votes: int) -> Iterator[Explanation]:
    """Yield what decided between the two most likely classes of each image."""
    logits = contributions.logits()
    label, rival = logits.topk(2, dim=1).indices.T
    text, pulls = contributions.pulls(label, rival)
    for image in range(len(logits)):
        own = {name: pull[:, image] for name, pull in pulls.items()}
        listed, others = largest_votes(own, contributions.key_labels, votes)
        yield Explanation(
            label=int(label[image]),
            rival=int(rival[image]),
            margin=float(logits[image, label[image]] - logits[image, rival[image]]),
            text=float(text[image]),
            sources={name: float(pull.sum()) for name, pull in own.items()},
            votes=listed,
            others=others,
        )


def largest_votes(pulls: Mapping[str, Tensor], key_labels: Tensor, votes: int) -> tuple[tuple[Vote, ...], float]:
    """Return the keys with the largest pulls either way, and the sum of all other keys' pulls.

    Args:
        pulls: {source: (M,)}.
        key_labels: (M,) int64.
        votes: at most so many keys are returned; none without a pull.
    """
    if not pulls:
        return (), 0.0
    total = torch.stack(list(pulls.values())).sum(dim=0)
    largest = total.abs().topk(min(votes, len(total))).indices
    listed = tuple(
        Vote(key, int(key_labels[key]), float(total[key]), {name: float(p[key]) for name, p in pulls.items()})
        for key in largest.tolist()
        if total[key] != 0
    )
    return listed, float(total.sum()) - sum(vote.pull for vote in listed)


def sentence_contributions(features: Tensor, sentences: Sequence[Tensor]) -> list[Tensor]:
    """Return what each sentence adds to p_ZS of its class.

    A column of W is the mean of a class's sentences, scaled to unit norm: a sum over them too.

    Args:
        features: (B, C), CLIP's features of images.
        sentences: for each class, the features of its sentences (T, C), as CLIP's text encoder gives them.

    Returns:
        For each class (B, T), whose sum over the sentences is its column of p_ZS = 100 f W.

    Raises:
        CafoError: a class without a sentence.
    """
    if without := [label for label, texts in enumerate(sentences) if not len(texts)]:
        raise CafoError(f"no sentence for the classes with numbers {', '.join(map(str, without[:20]))}")
    added = []
    for texts in sentences:
        length = texts.float().mean(dim=0).norm().clamp_min(_SMALLEST_NORM)
        added.append(100.0 * (features.float() @ texts.float().T) / (len(texts) * length))
    return added
