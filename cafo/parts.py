"""The parts of a cascade: p_ZS and the cache of each source, and what each adds on the images of a choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cafo.ensemble import NOTHING, ZERO_SHOT, Ensemble


class Part(NamedTuple):
    """The images that are correct at the best values with a part, without it, and by the part alone."""

    name: str
    """`zero_shot`, or the name of a source"""
    with_it: int
    without: int | None
    """None where no candidate leaves the part out"""
    alone: int | None
    """None where no candidate is the part alone"""

    @property
    def gain(self) -> int | None:
        """The number of images that the best values with the part gain; negative for a part that hurts."""
        return None if self.without is None else self.with_it - self.without


def measure_parts(
    sources: Sequence[str], correct: Mapping[int, int], ensembles: Sequence[Ensemble], zero_shot_correct: int
) -> tuple[Part, ...]:
    """Return p_ZS and each source as parts.

    Args:
        sources: names of the sources.
        correct: number of an ensemble → images correct at its best α and β.
        ensembles: the candidates.
        zero_shot_correct: images that p_ZS alone gets right.
    """
    used = {number: parts_of(ensembles[number], sources) for number in correct}
    counts = [
        (frozenset([ZERO_SHOT]), zero_shot_correct),
        *((used[number], count) for number, count in correct.items()),
    ]
    if all(ensemble.baseline == NOTHING for ensemble in ensembles):
        counts = counts[1:]
    found = []
    for name in (ZERO_SHOT, *sources):
        having = [count for parts, count in counts if name in parts]
        lacking = [count for parts, count in counts if name not in parts]
        alone = [count for parts, count in counts if parts == {name}]
        if having:
            found.append(Part(name, max(having), max(lacking, default=None), max(alone, default=None)))
    return tuple(found)


def parts_of(ensemble: Ensemble, sources: Sequence[str]) -> frozenset[str]:
    """Return the names of the parts that an ensemble uses."""
    names = ensemble.sources if ensemble.sources is not None else tuple(sources)
    return frozenset(names) | (frozenset() if ensemble.baseline == NOTHING else {ZERO_SHOT})
