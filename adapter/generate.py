"""Batched generation: prompts in, continuations out, over the engine's steps.

F features of an image.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adapter.decoder import Decoder
from adapter.engine.engine import Engine, check_prompt
from adapter.engine.request import Request
from adapter.errors import AdapterError
from adapter.generation_config import GenerationConfig


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
    window = model.config.max_seq_len
    for row, prompt in enumerate(prompts):
        check_prompt(prompt, window, model.config.vocab_size, f"prompt {row}")
    check_image_count(images, len(prompts))
    if config.seed is None:
        config = replace(config, seed=int(torch.randint(2**62, ())))
    longest = max((min(len(prompt) + config.max_new_tokens, window) for prompt in prompts), default=1)
    engine = Engine(
        model,
        slots=max(1, len(prompts)),
        max_length=longest,
        prefill_tokens=max(1, sum(map(len, prompts))),
        max_waiting=len(prompts),
    )
    repeats: Counter[tuple[int, ...]] = Counter()
    handles = []
    for prompt, image in zip(prompts, images or [None] * len(prompts), strict=True):
        key = tuple(map(int, prompt))
        handles.append(
            engine.submit(Request(prompt=key, image=image, config=config, stop_ids=eos_ids, repeat=repeats[key]))
        )
        repeats[key] += 1
    engine.run()
    for handle in handles:
        if handle.error is not None:
            raise handle.error
    return [handle.choices[0].ids for handle in handles]


def check_image_count(images: Sequence[Tensor | None] | None, n_rows: int) -> None:
    """Raise AdapterError unless there are no images at all, or one or None for each row."""
    if images is not None and len(images) != n_rows:
        raise AdapterError(f"{len(images)} images for {n_rows} rows: give one to each row, None where it has no image")
