"""Batched generation with a KV cache.

Prompts of unequal lengths are padded on the right and run once. From then on each row writes at its own position, so no
token ever attends to padding. A row that has ended leaves the batch.

B rows still running, V vocabulary, C width, F features of an image.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adapter.batching import pad
from adapter.decoder import Decoder
from adapter.errors import AdapterError
from adapter.generation_config import GenerationConfig
from adapter.kv_cache import KVCache


@torch.inference_mode()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig | None = None,
    *,
    eos_ids: Collection[int],
    images: Sequence[Tensor | None] | None = None,
    **overrides: Any,
) -> list[list[int]]:
    """Generate the ids that follow each prompt of ids, without EOS.

    eos_ids: the ids that end an answer, any of them; a chat model has one for its turns and one for texts.
    config: sampling settings; the defaults if None. overrides: single fields of it, such as `max_new_tokens=64`.
    images: each prompt's image features (F,), or None where the prompt has no image.

    A row ends at an EOS, after `max_new_tokens`, or when prompt and answer fill the window (`max_seq_len` of the
    model). A prompt that fills the window alone gets an empty answer.

    With a seed, a row's random numbers depend on the seed, on its own prompt, and on how many equal prompts precede it,
    but not on the rest of the batch. (Matrix products round differently at different batch sizes, so where two tokens
    are nearly equally likely the choice may still differ.)

    Raises AdapterError for a prompt that is empty, longer than the window, or holds an id outside the vocabulary, for
    settings out of range, and for another number of images than of prompts.
    """
    config = replace(config or GenerationConfig(), **overrides)
    _check_prompts(model, prompts)
    check_image_count(images, len(prompts))
    window, weight = model.config.max_seq_len, model.tok_embeddings.weight
    answers: list[list[int]] = [[] for _ in prompts]
    limits = [min(config.max_new_tokens, window - len(prompt)) for prompt in prompts]
    running = [row for row in range(len(prompts)) if limits[row] > 0]
    if not running:
        return answers

    generators = _row_generators(prompts, config.seed)
    cache_length = max(len(prompts[row]) + limits[row] for row in running)
    cache = KVCache(model.config, len(running), cache_length, weight.dtype, weight.device)
    row_images = None if images is None else [images[row] for row in running]
    last = _run_prompts(model, [prompts[row] for row in running], row_images, cache)  # (B, C)
    while True:
        draws = None
        if config.temperature:
            draws = torch.stack([torch.rand((), generator=generators[row]) for row in running])
        chosen = sample(model.output(last), config.temperature, config.top_p, draws)  # (B,)
        unfinished = []  # places within the batch
        for place, token in enumerate(chosen.tolist()):
            answer = answers[running[place]]
            if token not in eos_ids:
                answer.append(token)
                if len(answer) < limits[running[place]]:
                    unfinished.append(place)
        if not unfinished:
            return answers
        if len(unfinished) < len(running):
            running = [running[place] for place in unfinished]
            rows = torch.tensor(unfinished, device=weight.device)
            cache.select_rows(rows)
            chosen = chosen[rows]
        last = model.hidden_states(chosen[:, None], cache)[:, 0]


def _run_prompts(
    model: Decoder, prompts: Sequence[Sequence[int]], images: Sequence[Tensor | None] | None, cache: KVCache
) -> Tensor:
    """Fill the cache with the prompts. Returns the final hidden state of each prompt's last token, (B, C)."""
    device = model.tok_embeddings.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    batch_images = None if images is None else model.batch_images(images)
    hidden = model.hidden_states(pad(prompts).to(device), cache, batch_images)
    cache.truncate(lengths)
    return hidden[torch.arange(len(prompts), device=device), lengths - 1]


def sample(logits: Tensor, temperature: float, top_p: float, draws: Tensor | None) -> Tensor:
    """One token per row (B,) from logits (B, V), given draws (B,) uniform on [0, 1); temperature 0 needs no draws.

    Nucleus sampling by inverse CDF: a draw picks the first token, from the likeliest down, at which the cumulative
    probability exceeds it. It takes one number per row, so that each row can have a generator of its own.
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


def _row_generators(prompts: Sequence[Sequence[int]], seed: int | None) -> list[torch.Generator]:
    """One random generator per row. They live on the CPU, so that every device gets the same numbers."""
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    repeats: Counter[tuple[int, ...]] = Counter()
    generators = []
    for row in prompts:
        prompt = tuple(map(int, row))
        digest = hashlib.sha256(repr((seed, repeats[prompt], prompt)).encode()).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))
        repeats[prompt] += 1
    return generators


def check_image_count(images: Sequence[Tensor | None] | None, n_rows: int) -> None:
    """Raise AdapterError unless there are no images at all, or one or None for each row."""
    if images is not None and len(images) != n_rows:
        raise AdapterError(f"{len(images)} images for {n_rows} rows: give one to each row, None where it has no image")


def _check_prompts(model: Decoder, prompts: Sequence[Sequence[int]]) -> None:
    window, vocabulary = model.config.max_seq_len, model.config.vocab_size
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, int | str):
            raise AdapterError(f"prompt {row} is {prompt!r:.60}, not a list of ids: give a list of prompts of ids")
        if not prompt:
            raise AdapterError(f"prompt {row} is empty: it needs at least a BOS token")
        if len(prompt) > window:
            raise AdapterError(f"prompt {row} has {len(prompt)} tokens, the window holds {window}: shorten it")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            wrong = next(token for token in prompt if not 0 <= token < vocabulary)
            raise AdapterError(f"prompt {row} holds token {wrong}, the vocabulary has {vocabulary}: wrong tokenizer?")
