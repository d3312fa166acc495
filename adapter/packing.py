"""Pack a batch for training: every token once that the loss depends on, without padding, and a shared prefix only once.

A causal decoder's state of a token depends on the tokens before it and on nothing else. Rows that begin alike, as
records in one template do, therefore have equal states as far as they are alike, and those are computed once. Tokens
after a row's last label, and padding, are not computed at all. Attention alone sees rows: it reads the packed queries,
keys and values through an index. The model computes the same; only sums over tokens are rounded in another order.

B rows, T tokens of the longest, n packed tokens, m labels.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapter.loss import IGNORE


class Packing(NamedTuple):
    """The packed tokens of a batch, and where they stand in its rows."""

    tokens: Tensor
    """(n,) ids of the tokens, in the order of the rows that they stand in first."""
    positions: Tensor
    """(n,) position of each token in its row."""
    places: Tensor
    """(B, T) the packed token at each place; 0 for what is not computed, to which no packed token attends."""
    first: Tensor
    """(n,) the place, b T + t, where each packed token stands first."""
    again: Tensor
    """The places where a packed token stands again."""
    repeated: Tensor
    """The packed token at each place of `again`."""
    predicting: Tensor
    """(p,) the packed tokens that predict a label."""
    labelled: Tensor | None
    """(m,) the number in `predicting` of each label's token; None where that is 0, 1, …, m - 1."""
    targets: Tensor
    """(m,) the labels."""
    kept: Tensor | None = None
    """The packed tokens that a layer's output is needed of; None for all."""

    def to(self, device: torch.device) -> "Packing":
        """The same packing on a device."""
        moved = {name: one.to(device) for name, one in self._asdict().items() if one is not None}
        return self._replace(**moved)

    def last(self) -> "Packing":
        """The packing for the last layer, whose output is needed of the predicting tokens alone."""
        return self._replace(kept=self.predicting)

    def spread(self, x: Tensor) -> Tensor:
        """Lay out packed vectors (n, ...) as rows (B, T, ...). Places that are not computed hold other vectors."""
        return _Spread.apply(x, self)

    def collect(self, x: Tensor) -> Tensor:
        """The vectors of rows (B, T, ...) that belong to packed tokens and are kept."""
        return _Select.apply(x.flatten(0, 1), self.first if self.kept is None else self.first[self.kept])

    def keep(self, x: Tensor) -> Tensor:
        """The packed vectors (n, ...) that are kept."""
        return x if self.kept is None else _Select.apply(x, self.kept)


class _Spread(torch.autograd.Function):
    """Packed to rows. The gradient of a token is the sum over the places where it stands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return x.index_select(0, packing.places.flatten()).view(*packing.places.shape, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        packing, rows = ctx.packing, upstream[0].flatten(0, 1)
        grad = rows.index_select(0, packing.first)
        if len(packing.again):
            grad.index_add_(0, packing.repeated, rows.index_select(0, packing.again))
        return grad, None


class _Select(torch.autograd.Function):
    """Some rows of a matrix, each at most once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.n_rows, ctx.index = len(x), index
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        grad = upstream[0].new_zeros(ctx.n_rows, *upstream[0].shape[1:])
        grad[ctx.index] = upstream[0]
        return grad, None


def pack(tokens: Tensor, labels: Tensor, alone: Tensor | None = None) -> Packing:
    """Pack a batch of tokens (B, T) for its loss; labels (B, T) are aligned with the tokens, and IGNORE where none is.

    alone: rows (n,) that share no token with another, because their images differ.

    A batch without labels is packed as one token, so that every parameter still gets a gradient (of 0).
    """
    ids, targets = tokens.cpu().numpy(), labels.cpu().numpy()
    B, T = ids.shape
    is_labelled = targets != IGNORE
    is_labelled[:, 0] = False  # nothing predicts a first token
    lengths = T - 1 - is_labelled[:, ::-1].argmax(1)  # tokens before a row's last label
    lengths[~is_labelled.any(1)] = 0
    if not lengths.any():
        lengths[0] = 1
    computed = np.arange(T) < lengths[:, None]  # (B, T)
    equal = ids[:, None] == ids[None]  # (B, B, T): as far as rows b and a are alike
    if alone is not None:
        rows = alone.cpu().numpy()
        equal[rows], equal[:, rows] = False, False
        equal[rows, rows] = True
    equal &= computed[None]
    np.logical_and.accumulate(equal, axis=2, out=equal)
    owner = equal.argmax(1)  # (B, T): the first row that is alike as far as here
    is_first = computed & (owner == np.arange(B)[:, None])
    number = np.cumsum(is_first).reshape(B, T) - 1
    places = np.where(computed, number[owner, np.arange(T)], 0)
    first = np.flatnonzero(is_first)
    again = np.flatnonzero(computed & ~is_first)
    predicting, labelled = np.unique(places[:, :-1][is_labelled[:, 1:]], return_inverse=True)
    return Packing(
        tokens=torch.from_numpy(ids[is_first]),
        positions=torch.from_numpy(first % T),
        places=torch.from_numpy(places),
        first=torch.from_numpy(first),
        again=torch.from_numpy(again),
        repeated=torch.from_numpy(places.flatten()[again]),
        predicting=torch.from_numpy(predicting),
        labelled=None if np.array_equal(labelled, np.arange(len(labelled))) else torch.from_numpy(labelled),
        targets=torch.from_numpy(targets[is_labelled]),
    )
