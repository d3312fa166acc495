"""Adaptive inference: combine the predictions of several caches with CLIP's zero-shot prediction.

CaFo (arXiv 2303.02151), section 3.4 and table 5:

    z(p)   = (p - mean(p)) / std(p)                 over the classes of one image
    w_i    = Σ_n z(p_i)_n · z(p_ZS)_n               agreement of source i with the baseline              (eq. 8)
    p      = p_ZS + α · Σ_i softmax(w / τ)_i · s_i · z(p_i)                                              (eq. 9)

The paper has τ = 1 and s_i = 1. Every rule here has the form `base + α · term` with a term that does not depend on α,
which the search relies on. Training, search and evaluation all call `combine`.

Legend: B images, N classes, S sources that are combined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

import torch
from pydantic import with_config
from torch import Tensor

from cafo.errors import CafoError, refuse_text

ZERO_SHOT = "zero_shot"
NOTHING = "nothing"

Rule = Literal["adaptive", "average", "maximum"]

# A standard deviation over the classes below this share of the mean's magnitude is rounding error.
_ROUNDING = 1e-6


@with_config(extra="forbid")  # a field of a later version is refused
@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """One way to combine predictions.

    A single name in `sources` is the paper's "CLIP only" or "DINO only": a softmax over one source is 1.

    Raises:
        CafoError: an unknown rule, a temperature or a scale that is not positive, a baseline with a rule that has none.
    """

    rule: Rule = "adaptive"
    """`adaptive` weights by eq. 8; `average` takes the mean and `maximum` the largest z(p_i) of each class."""
    baseline: str = ZERO_SHOT
    """The prediction that eq. 8 compares with: `zero_shot`; the name of a source, which then changes places with p_ZS;
    or `nothing`, which leaves p_ZS out and weights all sources equally, like the DINO cache of the paper's table 4,
    which has no text."""
    sources: tuple[str, ...] | None = None
    """names of the caches to combine; None for all"""
    temperature: float = 1.0
    """τ of the softmax; w is a sum over N classes, so τ = 1 gives nearly all weight to one source"""
    scales: Mapping[str, float] = field(default_factory=dict)
    """s_i by source; 1 where absent"""

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise CafoError(f"ensemble rule {self.rule!r} is not one of {', '.join(get_args(Rule))}")
        refuse_text(self.sources, "sources")
        if not self.temperature > 0:
            raise CafoError(f"ensemble temperature must be positive, got {self.temperature}")
        if bad := {name: scale for name, scale in self.scales.items() if not scale > 0}:
            raise CafoError(f"ensemble scales must be positive (leave a source out through `sources`), got {bad}")
        if self.baseline != ZERO_SHOT and self.rule != "adaptive":
            raise CafoError(f"only the adaptive rule has a baseline; {self.rule!r} was given {self.baseline!r}")


class Combination(NamedTuple):
    """The parts of combined predictions; the logits are `base + α · term`."""

    base: Tensor
    """(…, B, N)"""
    term: Tensor
    """(…, B, N), independent of α"""
    shares: Tensor
    """(…, B, S), weight of each source: the softmax of eq. 8; 1/S for the average; for the maximum, the share of the
    classes where the source is the largest"""
    sources: tuple[str, ...]
    """names of the S sources, in the order of `shares`"""

    def logits(self, alpha: float) -> Tensor:
        """Return the logits of eq. 9: (…, B, N)."""
        return self.base + alpha * self.term


def standardise(p: Tensor) -> Tensor:
    """Return z(p) of eq. 8: zero mean and unit variance (unbiased, N - 1) over the classes; (…, N) → (…, N).

    A prediction that is equal for all classes up to rounding becomes zeros, not rounding errors of unit variance.
    """
    centred, inverse = _centre(p)
    return centred * inverse


def inverse_spread(p: Tensor) -> Tensor:
    """Return 1 / std(p) of eq. 8, and 0 where `standardise` gives zeros: (…, N) → (…, 1)."""
    return _centre(p)[1]


def _centre(p: Tensor) -> tuple[Tensor, Tensor]:
    mean = p.mean(dim=-1, keepdim=True)
    centred = p - mean
    return centred, inverse_deviation(torch.linalg.vector_norm(centred, dim=-1, keepdim=True), mean, p.shape[-1])


def inverse_deviation(norm: Tensor, mean: Tensor, classes: int) -> Tensor:
    """Return 1 / std(p) of eq. 8, and 0 where `standardise` gives zeros.

    Args:
        norm: the Euclidean norm of p - mean(p) over the classes, of any shape.
        mean: mean(p), of the same shape.
        classes: N.
    """
    spread = norm / (classes - 1) ** 0.5
    floor = (_ROUNDING * mean.detach().abs()).clamp_min(torch.finfo(mean.dtype).tiny)
    return torch.where(spread > floor, 1 / spread.clamp_min(floor), 0.0)


def combine(
    zero_shot: Tensor,
    caches: Mapping[str, Tensor],
    ensemble: Ensemble,
    standardised: Mapping[str, Tensor] = MappingProxyType({}),
    agreement: Callable[[str, str], Tensor] | None = None,
) -> Combination:
    """Combine predictions by eq. 8-9 or by one of the alternatives of table 5.

    Args:
        zero_shot: p_ZS, (B, N).
        caches: p_i by source name, each (…, B, N). Leading axes, such as the values of β in a search, are kept in the
            result. A positive factor per image does not change the result.
        ensemble: the rule.
        standardised: z(p_i) by source name, and z(p_ZS) by `zero_shot`, as far as they are known already.
        agreement: returns w of eq. 8 of two of them by name, (…, B), where the given predictions are of some classes
            only and the sum over all is known.

    Raises:
        CafoError: fewer than two classes, an unknown source, or no source to combine.
    """
    if zero_shot.shape[-1] < 2:
        raise CafoError("an ensemble over classes needs at least two classes")
    names = tuple(caches) if ensemble.sources is None else ensemble.sources
    required = {*names, *ensemble.scales} | ({ensemble.baseline} - {ZERO_SHOT, NOTHING})
    if unknown := required - set(caches):
        raise CafoError(f"no cache named {', '.join(sorted(unknown))}; there are {', '.join(caches) or 'none'}")
    base, predictions = zero_shot, {name: caches[name] for name in names}
    if ensemble.baseline == NOTHING:
        base = torch.zeros_like(zero_shot)
    elif ensemble.baseline != ZERO_SHOT:
        # Table 5's other baselines: p_i and p_ZS change places. The size of a sum of φ depends on β, so the new base is
        # standardised, which keeps α comparable across β.
        known = standardised.get(ensemble.baseline)
        base = standardise(caches[ensemble.baseline]) if known is None else known
        predictions = {ZERO_SHOT: zero_shot} | {n: p for n, p in predictions.items() if n != ensemble.baseline}
    if not predictions:
        raise CafoError("an ensemble needs at least one source")
    z = [standardised[name] if name in standardised else standardise(p) for name, p in predictions.items()]
    scales = [ensemble.scales.get(name, 1.0) for name in predictions]
    scaled = [zi if scale == 1 else scale * zi for scale, zi in zip(scales, z, strict=True)]
    if ensemble.rule == "adaptive":
        if ensemble.baseline == NOTHING:
            weights = [torch.zeros_like(zi[..., 0]) for zi in z]
        elif agreement is not None:
            weights = [agreement(name, ensemble.baseline) for name in predictions]
        else:
            known = standardised.get(ZERO_SHOT) if base is zero_shot else None
            z_base = standardise(base) if known is None else known
            weights = [(zi * z_base).sum(dim=-1) for zi in z]
        shares = torch.softmax(torch.stack(weights) / ensemble.temperature, dim=0)  # (S, …, B)
        parts = [share[..., None] * zi for share, zi in zip(shares, scaled, strict=True)] if len(z) > 1 else scaled
        term = reduce(torch.add, parts)
    elif ensemble.rule == "average":
        shares = torch.stack([torch.full_like(zi[..., 0], 1 / len(z)) for zi in z])
        term = torch.stack(scaled).mean(dim=0)
    else:
        term, winner = torch.stack(scaled).max(dim=0)  # (…, B, N)
        shares = torch.stack([(winner == i).float().mean(dim=-1) for i in range(len(z))])
    return Combination(base, term, shares.movedim(0, -1), tuple(predictions))


def table5(sources: tuple[str, ...]) -> dict[str, Ensemble]:
    """Return the rows of the paper's table 5, by label, for any number of sources; and each source without p_ZS."""
    refuse_text(sources, "sources")
    return {
        **{f"{name} alone": Ensemble(baseline=NOTHING, sources=(name,)) for name in sources},
        **{f"{name} only": Ensemble(sources=(name,)) for name in sources},
        "average": Ensemble(rule="average"),
        "maximum": Ensemble(rule="maximum"),
        **{f"baseline {name}": Ensemble(baseline=name) for name in sources},
        "baseline zero-shot": Ensemble(),
    }
