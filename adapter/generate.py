"""Batched decoding with a KV cache.

Prompts of unequal lengths are padded on the right and run once; from then on each row writes at its own position, so no
token ever attends to padding. A row that ends (EOS, its allowance, the window) leaves the batch.

B rows still running, V vocabulary, C width.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from adapter.decoder import KVCache, Llama
from adapter.errors import AdapterError


@torch.inference_mode()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    eos_id: int,
    images: Sequence[Tensor | None] | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.1,
    top_p: float = 0.75,
    seed: int | None = None,
) -> list[list[int]]:
    """The ids that follow each prompt, EOS left out. images: each prompt's features (F,), or None where it has none.

    A row ends at EOS, after max_new_tokens, or where prompt and answer fill the window (`config.max_seq_len`); a prompt
    that fills it alone gets no answer. temperature 0 takes the likeliest token, whatever top_p; else the draw is from
    the smallest set of tokens whose probability reaches top_p.

    With a seed, a row's draws depend on the seed, on its own prompt and on how many equal prompts stand before it, not
    on the rest of the batch (matrix products round differently at different batch sizes: a near tie may still fall
    otherwise). Without one they follow torch's global generator.

    Raises ValueError for a prompt that is empty, exceeds the window or holds an id outside the vocabulary, and for
    settings out of range.
    """
    _check(model, prompts, max_new_tokens, temperature, top_p)
    window, weight = model.config.max_seq_len, model.tok_embeddings.weight
    answers: list[list[int]] = [[] for _ in prompts]
    room = [min(max_new_tokens, window - len(prompt)) for prompt in prompts]
    running = [row for row in range(len(prompts)) if room[row] > 0]
    if not running:
        return answers

    dice = _dice(prompts, seed)
    lengths = torch.tensor([len(prompts[row]) for row in running], device=weight.device)
    slots = max(len(prompts[row]) + room[row] for row in running)
    cache = KVCache(model.config, len(running), slots, weight.dtype, weight.device)
    tokens = torch.zeros(len(running), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(running):
        tokens[i, : len(prompts[row])] = torch.tensor(prompts[row])
    seen = None if images is None else model.images([images[row] for row in running])
    hidden = model.hidden(tokens.to(weight.device), cache, seen)
    cache.trim(lengths)
    last = hidden[torch.arange(len(running), device=weight.device), lengths - 1]  # (B, C)

    while True:
        draws = torch.stack([torch.rand((), generator=dice[row]) for row in running]) if temperature else None
        chosen = choose(model.output(last), temperature, top_p, draws)
        going = []
        for i, token in enumerate(chosen.tolist()):
            answer = answers[running[i]]
            if token != eos_id:
                answer.append(token)
                if len(answer) < room[running[i]]:
                    going.append(i)
        if not going:
            return answers
        if len(going) < len(running):
            running = [running[i] for i in going]
            rows = torch.tensor(going, device=weight.device)
            cache.keep(rows)
            chosen = chosen[rows]
        last = model.hidden(chosen[:, None], cache)[:, 0]


def choose(logits: Tensor, temperature: float, top_p: float, draws: Tensor | None) -> Tensor:
    """One token per row (B,) from logits (B, V); draws (B,) are uniform on [0, 1), unused at temperature 0.

    Inverse-CDF sampling: a draw picks the first token, from the likeliest down, at which the running sum of
    probabilities exceeds it. One number per row, so that rows can have their own generators.
    """
    if not temperature or draws is None:
        return logits.argmax(-1)
    logits = logits.float()
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature  # at most 0: a tiny temperature cannot overflow
    p, token = scaled.softmax(-1).sort(-1, descending=True)
    cumulative = p.cumsum(-1)
    last = ((cumulative - p) < top_p).sum(-1, keepdim=True) - 1  # the nucleus is sorted places 0..last
    level = draws.to(p.device)[:, None] * cumulative.gather(-1, last)
    place = torch.minimum((cumulative <= level).sum(-1, keepdim=True), last)
    return token.gather(-1, place)[:, 0]


def _dice(prompts: Sequence[Sequence[int]], seed: int | None) -> list[torch.Generator]:
    """One generator per row, on the CPU so that every device draws the same numbers."""
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    seen: Counter[tuple[int, ...]] = Counter()
    dice = []
    for row in prompts:
        prompt = tuple(map(int, row))
        digest = hashlib.sha256(repr((seed, seen[prompt], prompt)).encode()).digest()
        dice.append(torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))
        seen[prompt] += 1
    return dice


def _check(
    model: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_p: float
) -> None:
    if max_new_tokens < 1:
        raise AdapterError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise AdapterError(f"temperature must be 0 (greedy) or a positive number, got {temperature}")
    if not 0 < top_p <= 1:
        raise AdapterError(f"top_p must be in (0, 1], got {top_p}")
    window, vocabulary = model.config.max_seq_len, model.config.vocab_size
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise AdapterError(f"prompt {row} is empty: it needs at least a BOS token")
        if len(prompt) > window:
            raise AdapterError(f"prompt {row} has {len(prompt)} tokens, the window holds {window}: shorten it")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            wrong = next(token for token in prompt if not 0 <= token < vocabulary)
            raise AdapterError(f"prompt {row} holds token {wrong}, the vocabulary has {vocabulary}: wrong tokenizer?")
