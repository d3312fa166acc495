"""A set of images, reduced to what a choice of α, β and ensemble needs of them.

One pass over the images, block by block, leaves of each the classes that compete (`cafo.competing_classes`). All
accuracies follow from them: those of the search, of its refinements, of the plots and of the estimate's folds. Memory
does not grow with the number of images, but for some bytes each: intervals are computed for some values of β and some
ensembles at a time, and what is left of many images is in a temporary file.

Legend: B images, J values of β, E ensembles, A values of α.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from cafo.beta_nodes import class_slots
from cafo.competing_classes import ReducedGroup, reduce_block
from cafo.ensemble import Ensemble
from cafo.held_out import IMAGES_PER_BLOCK, HeldOutImages
from cafo.spill import Spill

_INTERVALS = 1 << 23
"""intervals that are computed at once"""
_BETAS = 64
"""values of β that they are computed at, or fewer"""
_T = TypeVar("_T")
_R = TypeVar("_R")


class Intervals(NamedTuple):
    """The intervals of α on which images are correct, for some ensembles and values of β."""

    ensembles: range
    """the numbers of the ensembles"""
    betas: range
    """the positions of the values of β"""
    low: Tensor
    """(E', J', B)"""
    high: Tensor
    """(E', J', B)"""


@dataclass(frozen=True, kw_only=True, eq=False)
class ReducedImages:
    """Images and the classes that compete with their labels."""

    images: HeldOutImages
    """all images that were reduced"""
    groups: Sequence[ReducedGroup]
    zero_shot_correct: Tensor
    """(B,) bool: whether p_ZS alone is right"""
    zero_shot_deviation: Tensor
    """(B,): the standard deviation of p_ZS over the classes"""
    rows: Tensor
    """(B',) int64: those of the images that are meant"""

    @property
    def labels(self) -> Tensor:
        """(B',) int64."""
        return self.images.labels[self.rows]

    def subset(self, rows: Tensor) -> ReducedImages:
        """Return some of the images, by position; nothing is computed again."""
        return replace(self, rows=self.rows[rows])

    def originals(self, rows: Tensor) -> HeldOutImages:
        """Return some of the images as they were, by position."""
        return self.images.images(self.rows[rows])

    def intervals(self, betas: Sequence[float], ensembles: Sequence[Ensemble]) -> Iterator[Intervals]:
        """Yield the intervals of α at every β and ensemble, some at a time: all ensembles together, as far as they go.

        Args:
            betas: J values, between those that the images were reduced for.
            ensembles: E ensembles.
        """
        images = len(self.images.labels)
        some_ensembles = max(1, min(len(ensembles), _INTERVALS // images))
        some_betas = max(1, min(_BETAS, len(betas), _INTERVALS // (some_ensembles * images)))
        for e in range(0, len(ensembles), some_ensembles):
            of_ensembles = range(e, min(e + some_ensembles, len(ensembles)))
            for j in range(0, len(betas), some_betas):
                of_betas = range(j, min(j + some_betas, len(betas)))
                ends = self._ends(betas[j : of_betas.stop], ensembles[e : of_ensembles.stop])
                yield Intervals(of_ensembles, of_betas, ends[0], ends[1])

    def count_correct(self, alpha: float, beta: float, ensemble: Ensemble) -> int:
        """Return the number of images that are correct at some values.

        Images whose label is ahead or behind by so little that it may be rounding are evaluated by eq. 6-9 in float64.
        """
        images, sources = self.images, self.images.sources
        lead, rounding = self.zero_shot_deviation.new_empty(2, len(images.labels))

        def fill(group: ReducedGroup) -> None:
            lead[group.rows], rounding[group.rows] = group.leads(sources, alpha, beta, ensemble)

        _map_blocks(fill, self.groups, images.labels.device)
        lead, rounding = lead[self.rows], rounding[self.rows]
        close = lead.abs() <= rounding
        correct = int(((lead > 0) & ~close).sum())
        if bool(close.any()):
            correct += self.originals(close.nonzero()[:, 0]).count_correct(alpha, beta, ensemble)
        return correct

    def count_correct_at(self, alphas: Sequence[float], betas: Sequence[float], ensemble: Ensemble) -> Tensor:
        """Return the number of correct images at each β and α, as the intervals tell: (J, A) int64."""
        counts = []
        for part in self.intervals(betas, [ensemble]):
            low, high = part.low[0], part.high[0]
            correct = [((low <= alpha) & (alpha < high)).sum(dim=1) for alpha in low.new_tensor(alphas)]
            counts.append(torch.stack(correct, dim=1))
        return torch.cat(counts)

    def _ends(self, betas: Sequence[float], ensembles: Sequence[Ensemble]) -> Tensor:
        """Return the low and the high end of every interval: (2, E, J, B')."""
        images, sources = self.images, self.images.sources
        ends = self.zero_shot_deviation.new_empty(2, len(ensembles), len(betas), len(images.labels))

        def fill(group: ReducedGroup) -> None:
            ends[..., group.rows] = group.intervals(sources, betas, ensembles)

        _map_blocks(fill, self.groups, images.labels.device)
        everything = torch.equal(self.rows, torch.arange(len(images.labels), device=self.rows.device))
        return ends if everything else ends[..., self.rows]


def reduce_images(images: HeldOutImages, low: float, high: float) -> ReducedImages:
    """Read all images once.

    Args:
        images: at least one image.
        low, high: the range of β that can be asked for afterwards.
    """
    rows = torch.arange(len(images.labels), device=images.labels.device)
    slots = class_slots(images.key_labels, images.classes)
    correct = torch.empty(len(rows), dtype=torch.bool, device=rows.device)
    deviation = torch.empty(len(rows), device=rows.device)

    def read_block(at: Tensor) -> list[ReducedGroup]:
        block = images.images(at).load()
        correct[at] = block.zero_shot.argmax(dim=1) == block.labels
        deviation[at] = block.zero_shot.float().std(dim=1)
        return _keep(reduce_block(block, at, slots, low, high), spill)

    with Spill() as spill:
        blocks = _map_blocks(read_block, rows.split(IMAGES_PER_BLOCK), rows.device)
    groups = [group for of_block in blocks for group in of_block]
    return ReducedImages(
        images=images, groups=groups, zero_shot_correct=correct, zero_shot_deviation=deviation, rows=rows
    )


def _keep(groups: Sequence[ReducedGroup], spill: Spill) -> list[ReducedGroup]:
    """Return a block's groups, whose large tensors may be in a file."""
    large = ("zero_shot", "standard_zero_shot", "sums", "means", "products")
    kept = iter(spill.keep([getattr(group, name) for group in groups for name in large]))
    return [
        group._replace(
            zero_shot=next(kept),
            standard_zero_shot=next(kept),
            sums=next(kept),
            means=next(kept),
            products=next(kept),
        )
        for group in groups
    ]


def _map_blocks(function: Callable[[_T], _R], items: Iterable[_T], device: torch.device) -> list[_R]:
    """Return the function's results, computed in as many threads as PyTorch uses here."""

    @torch.no_grad()  # grad mode is per thread, so the caller's does not hold there
    def without_gradient(item: _T) -> _R:
        return function(item)

    with _block_threads(device) as pool:
        return list(pool.map(without_gradient, items))


@contextmanager
def _block_threads(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool with as many threads as PyTorch uses here, each of which runs PyTorch single-threaded.

    A block is many short operations on tensors in the CPU's cache. PyTorch's own threads, which split each operation,
    would spend most of the time waiting for one another.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # holds for this thread; the pool's threads set it for themselves
    try:
        with ThreadPoolExecutor(threads if device.type == "cpu" else 1, "search", torch.set_num_threads, (1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)
