"""Attention through the cache against attention to whole sequences, in layers of every kind."""

from typing import Any

import pytest
import torch

from adapter.adaption import AdaptionConfig
from adapter.decoder import Decoder
from adapter.engine.row_prompts import PromptLayers, PromptRows, read_prompts
from adapter.kv_cache import Chunk, KVCache, Step
from adapter.rope import DynamicScaling
from tests.adapter.models import GQA, MHA, llama, tokens

SHAPES: dict[str, dict[str, Any]] = {
    "mha": MHA,
    "gqa": GQA,
    "sliding": {**GQA, "sliding_window": 5, "sliding_layers": frozenset({0, 2, 4}), "sliding_rope_theta": 77.0},
    "capped": {**GQA, "score_cap": 1.5, "sliding_window": 4, "sliding_layers": frozenset({1, 3})},
    "normed": {**GQA, "qk_norm": True, "qkv_bias": True, "unrotated_layers": frozenset({2})},
}
LENGTHS = [13, 2, 7]


class Held:
    """Sequences in a cache, which are run in steps."""

    def __init__(self, model: Decoder, slots: int, length: int) -> None:
        self.model = model
        self.cache = KVCache(model.config, slots, length, torch.float32, "cpu")
        self.prompts = PromptRows(model.config, slots, torch.float32, "cpu")
        for slot in range(slots):
            self.prompts.put(slot, read_prompts(model, PromptLayers.of(model)))

    def run(self, ids: list[int], lengths: list[int], chunks: list[Chunk]) -> torch.Tensor:
        return self.model.hidden_states(torch.tensor([ids]), Step(self.cache, self.prompts, lengths, chunks))[0]


@pytest.mark.parametrize("gate", ["tanh", "prefix"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_steps_equal_the_whole(shape, gate):
    """Prompts in chunks beside sequences that go on; one slot's sequence moves into another's place."""
    model = llama(SHAPES[shape], AdaptionConfig(n_layers=3, prompt_length=7, gate=gate))
    held, ids = Held(model, 3, 23), [tokens(1, length + 5, seed=length)[0].tolist() for length in LENGTHS]
    whole = [model.hidden_states(torch.tensor([row]))[0] for row in ids]
    seen: list[list[torch.Tensor]] = [[], [], []]

    read = held.run(ids[0][:13] + ids[1][:2], [], [Chunk(0, 0, 13, 13), Chunk(1, 0, 2, 2)])
    seen[0].append(read[:13])
    seen[1].append(read[13:])
    read = held.run([ids[0][13], ids[1][2], *ids[2][:4]], [13, 2], [Chunk(2, 0, 4, 7)])
    for row, part in enumerate(read.split([1, 1, 4])):
        seen[row].append(part)
    read = held.run([ids[0][14], ids[1][3], *ids[2][4:7]], [14, 3], [Chunk(2, 4, 7, 7)])
    for row, part in enumerate(read.split([1, 1, 3])):
        seen[row].append(part)
    held.cache.copy_slot(2, 0, 7)
    held.prompts.copy_slot(2, 0)
    read = held.run([ids[2][7], ids[1][4]], [7, 4], [])
    for row, part in zip((2, 1), read, strict=True):
        seen[row].append(part[None])
    for row, expected in enumerate(whole):
        actual = torch.cat(seen[row])
        torch.testing.assert_close(actual, expected[: len(actual)], rtol=0, atol=1e-4)


@torch.no_grad()
def test_each_sequence_has_the_frequencies_of_its_own_length():
    """A long neighbour changes nothing; a prompt in chunks turns as the whole prompt."""
    scaling = DynamicScaling(factor=3.0, original_length=11)
    model = llama({**GQA, "rope_scaling": scaling})
    long, short = tokens(1, 19)[0].tolist(), tokens(1, 5, seed=1)[0].tolist()
    held = Held(model, 2, 23)
    first = held.run([*long[:6], *short], [], [Chunk(0, 0, 6, 19), Chunk(1, 0, 5, 5)])
    second = held.run(long[6:], [], [Chunk(0, 6, 19, 19)])
    expected = [model.hidden_states(torch.tensor([ids]))[0] for ids in (long, short)]
    torch.testing.assert_close(torch.cat([first[:6], second]), expected[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(first[6:], expected[1], rtol=0, atol=1e-4)


def test_a_cache_takes_the_bytes_that_it_says():
    model = llama(GQA)
    cache = KVCache(model.config, 3, 17, torch.bfloat16, "cpu")
    assert cache.tensor.nbytes == KVCache.n_bytes(model.config, 3, 17, torch.bfloat16)
