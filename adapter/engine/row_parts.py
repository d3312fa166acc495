"""The parts of adapters inside the base's layers (LoRA, (IA)³, biases, V2), each for the tokens of its own sequences.

Such a part changes a linear layer's output, or a norm's weight, token by token. So the base's product is computed once
for the tokens of all sequences, and each adapter's part is applied to its own tokens (`PartRows`).

N tokens of a step, C width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapter.decoder import Decoder, RMSNorm
from adapter.methods.base import AdapterPart, Delta, deltas


@dataclass(frozen=True, eq=False)
class AdapterParts:
    """The parts of one adapter by the path of the layer that holds them in the decoder."""

    deltas: Mapping[str, Delta]
    """Parts of linear layers."""
    shifts: Mapping[str, AdapterPart]
    """Parts of norms."""

    @classmethod
    def of(cls, model: Decoder) -> "AdapterParts | None":
        """The parts that a decoder holds; None for a base, and for an adapter of prompts alone."""
        shifts = {path: norm.shift for path, norm in model.named_modules() if isinstance(norm, RMSNorm) and norm.shift}
        parts = cls({path: delta for path, _, delta in deltas(model)}, shifts)
        return parts if parts.deltas or parts.shifts else None

    @property
    def modules(self) -> list[AdapterPart]:
        """All parts."""
        return [*self.deltas.values(), *self.shifts.values()]

    @property
    def n_bytes(self) -> int:
        """Bytes of the parameters."""
        return sum(parameter.nbytes for module in self.modules for parameter in module.parameters())


Owner = tuple[AdapterParts | None, int]
"""The parts that some tokens are computed with, None for the base's alone, and the number of these tokens."""


class PartRows:
    """Puts the parts of several adapters on one decoder, for the length of a forward."""

    def __init__(self, model: Decoder) -> None:
        """model: parts that it holds itself are those of sequences without a named adapter."""
        self._model, self.own = model, AdapterParts.of(model)

    @contextmanager
    def installed(self, owners: Sequence[Owner]) -> Iterator[None]:
        """Within this, the decoder runs tokens of these owners, in this order."""
        kinds = list(dict.fromkeys(parts for parts, _ in owners))
        if kinds == [self.own]:
            yield
            return
        everyone = [parts for parts in [self.own, *kinds] if parts is not None]
        try:
            self._put(everyone, {parts: self._tokens_of(parts, owners) for parts in kinds if parts is not None}, owners)
            yield
        finally:
            self._put(everyone, {} if self.own is None else {self.own: None}, ())

    def _put(
        self, everyone: Sequence[AdapterParts], rows: Mapping[AdapterParts, Tensor | None], owners: Sequence[Owner]
    ) -> None:
        """Give every layer that holds a part of anyone the parts of the adapters in `rows`, for their tokens.

        A None in place of an adapter's tokens stands for all.
        """
        n_tokens = sum(n for _, n in owners)
        for kind, name in (("deltas", "delta"), ("shifts", "shift")):
            for path in dict.fromkeys(path for parts in everyone for path in getattr(parts, kind)):
                groups: list[tuple[Any, Any]] = [
                    (getattr(p, kind)[path], tokens) for p, tokens in rows.items() if path in getattr(p, kind)
                ]
                part: Any = None
                if groups and groups[0][1] is None:
                    part = groups[0][0]
                elif groups:
                    part = RowDelta(groups) if kind == "deltas" else RowShift(groups, n_tokens)
                setattr(self._model.get_submodule(path), name, part)

    def _tokens_of(self, wanted: AdapterParts, owners: Sequence[Owner]) -> Tensor | None:
        """The places (n,) of one adapter's tokens; None if all are."""
        if all(parts is wanted for parts, _ in owners):
            return None
        mask = torch.cat([torch.full((n,), parts is wanted) for parts, n in owners])
        return mask.nonzero()[:, 0].to(self._model.tok_embeddings.weight.device)


class RowDelta(nn.Module):
    """The deltas of several adapters in one linear layer."""

    def __init__(self, groups: Sequence[tuple[Any, Tensor]]) -> None:
        """groups: each adapter's delta and the places (n,) of its tokens among the step's."""
        super().__init__()
        self._groups = groups

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for delta, tokens in self._groups:
            y[:, tokens] = delta(x[:, tokens], y[:, tokens])
        return y


class RowShift(nn.Module):
    """The shifts of several adapters in one norm."""

    def __init__(self, groups: Sequence[tuple[Any, Tensor]], n_tokens: int) -> None:
        """groups: each adapter's shift and the places (n,) of its tokens among the step's `n_tokens`."""
        super().__init__()
        self._groups, self._n_tokens = groups, n_tokens

    def forward(self, weight: Tensor) -> Tensor:
        """The norm's weight for each token, (N, C), in float32."""
        shifted = weight.float().repeat(self._n_tokens, 1)
        for shift, tokens in self._groups:
            shifted[tokens] = shift(weight)
        return shifted
