"""Choose the next token of each sequence of a batch, whose sequences each have settings of their own.

Nucleus sampling by inverse CDF: one number, uniform on [0, 1), picks the first token, from the likeliest down, at which
the cumulative probability exceeds it. A sequence needs one number per token, so each can have a generator of its own,
whose numbers no other sequence touches. Equally likely tokens are ordered by id.

B sequences, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CANDIDATES = 256
"""Likeliest tokens that are looked at first; the whole vocabulary is sorted only where these are not the nucleus."""


class SamplingSettings(NamedTuple):
    """The settings of one sequence."""

    temperature: float
    """0 takes the likeliest token, whatever the rest."""
    top_p: float = 1.0
    """Sample from the smallest set of likeliest tokens whose probabilities sum to at least this."""
    top_k: int = 0
    """Sample from at most this many of the likeliest tokens; 0 for no limit."""


class TokenLogprob(NamedTuple):
    """A chosen token's log-probability under the model, and its likeliest rivals', whatever the sampling settings."""

    id: int
    logprob: float
    top: list[tuple[int, float]]
    """The likeliest tokens and their log-probabilities, likeliest first."""


def choose(
    logits: Tensor, settings: Sequence[SamplingSettings], generators: Sequence[torch.Generator | None]
) -> Tensor:
    """Choose one token per sequence, (B,) int64, from logits (B, V). A greedy sequence needs no generator."""
    chosen = logits.float().argmax(-1)  # in bfloat16 it is many times slower
    drawn = [row for row, one in enumerate(settings) if one.temperature > 0]
    if drawn:
        numbers = torch.stack([torch.rand((), generator=generators[row]) for row in drawn])
        rows = logits if len(drawn) == len(logits) else logits[drawn]
        temperature, top_p, top_k = zip(*(settings[row] for row in drawn), strict=True)
        chosen[drawn] = sample(rows, temperature, top_p, top_k, numbers)
    return chosen


def sample(
    logits: Tensor, temperature: Sequence[float], top_p: Sequence[float], top_k: Sequence[int], draws: Tensor
) -> Tensor:
    """One token per row (B,) from logits (B, V), given positive temperatures and draws (B,) uniform on [0, 1)."""
    device, V = logits.device, logits.shape[1]
    logits = logits.float()
    scaled = logits - logits.amax(-1, keepdim=True)  # at most 0: a tiny temperature cannot overflow
    p = (scaled / torch.tensor(temperature, device=device)[:, None]).softmax(-1)
    share = torch.tensor(top_p, device=device)[:, None]
    limit = torch.tensor([k or V for k in top_k], device=device)[:, None]
    draws = draws.to(device)[:, None]
    if V <= 2 * CANDIDATES:
        return _pick(*_sorted(p, torch.arange(V, device=device)), share, limit, draws)[0]
    ids = p.topk(CANDIDATES, sorted=False).indices.sort(-1).values
    p_best, best = _sorted(p.gather(-1, ids), ids)
    chosen, last = _pick(p_best, best, share, limit, draws)
    # Tokens as likely as the last candidate may be missing, so a nucleus that reaches it may be incomplete.
    complete = (p_best.gather(-1, last) > p_best[:, -1:])[:, 0]
    if not complete.all():
        rows = (~complete).nonzero()[:, 0]
        everything = _sorted(p[rows], torch.arange(V, device=device))
        chosen[rows] = _pick(*everything, share[rows], limit[rows], draws[rows])[0]
    return chosen


def _sorted(p: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (B, n) of ascending ids (n,) or (B, n), likeliest first and then by id; and their ids."""
    p, order = p.sort(dim=-1, descending=True, stable=True)
    return p, ids.expand_as(order).gather(-1, order)


def _pick(p: Tensor, ids: Tensor, share: Tensor, limit: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """The token that each draw picks, (B,), and the nucleus's last place, (B, 1).

    p, ids: sorted (B, n). share, limit, draws: (B, 1).
    """
    cumulative = p.cumsum(-1)
    last = ((cumulative - p) < share).sum(-1, keepdim=True).minimum(limit) - 1  # the nucleus is places 0..last
    level = draws * cumulative.gather(-1, last)
    place = torch.minimum((cumulative <= level).sum(-1, keepdim=True), last)
    return ids.gather(-1, place)[:, 0], last


def log_probabilities(logits: Tensor, chosen: Sequence[int], n_top: Sequence[int]) -> list[TokenLogprob]:
    """The log-probabilities of chosen tokens (B,) under logits (B, V), and of each row's `n_top` likeliest tokens."""
    logp = logits.float().log_softmax(-1)
    best = logp.topk(max(n_top)) if max(n_top) else None
    rows = []
    for row, (token, n) in enumerate(zip(chosen, n_top, strict=True)):
        top = (
            []
            if best is None
            else list(zip(best.indices[row, :n].tolist(), best.values[row, :n].tolist(), strict=True))
        )
        rows.append(TokenLogprob(token, float(logp[row, token]), top))
    return rows


def random_generator(seed: int, prompt: Sequence[int], repeat: int) -> torch.Generator:
    """The random generator of a sequence: it depends on the seed, on the prompt, and on its number among equal ones.

    It lives on the CPU, so that every device gets the same numbers.
    """
    digest = hashlib.sha256(repr((seed, repeat, tuple(map(int, prompt)))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
