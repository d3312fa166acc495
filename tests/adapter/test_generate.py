from collections.abc import Collection
from itertools import takewhile

import pytest
import torch

from adapter.adaption import Adaption, AdaptionConfig
from adapter.decoder import Decoder
from adapter.generate import generate
from tests.adapter.models import GQA, MHA, llama, tokens

WINDOW = 23
SMALL = {"n_layers": 3, "max_seq_len": WINDOW}
PROMPTS = [[1, 5, 7, 90, 3], [2], [*range(40, 59)], [11] * 11, [1, 5, 7, 90, 3]]
"""Unequal lengths; the third leaves four places of the window."""
NEVER: Collection[int] = ()


@pytest.fixture(params=[MHA, GQA], ids=["mha", "gqa"])
def model(request) -> Decoder:
    return llama({**request.param, **SMALL}, AdaptionConfig(n_layers=2, prompt_length=7))


@torch.no_grad()
def greedy_without_cache(model: Decoder, prompt: list[int], eos_ids: Collection[int], max_new_tokens: int) -> list[int]:
    answer: list[int] = []
    while len(answer) < max_new_tokens and len(prompt) + len(answer) < model.config.max_seq_len:
        token = int(model(torch.tensor([prompt + answer]))[0, -1].argmax())
        if token in eos_ids:
            break
        answer.append(token)
    return answer


def test_greedy_equals_greedy_without_cache(model):
    answers = generate(model, PROMPTS, eos_ids=NEVER, temperature=0)
    assert answers == [greedy_without_cache(model, prompt, NEVER, 256) for prompt in PROMPTS]
    assert [len(answer) for answer in answers] == [WINDOW - len(prompt) for prompt in PROMPTS]
    assert answers == [generate(model, [prompt], eos_ids=NEVER, temperature=0)[0] for prompt in PROMPTS]


def test_each_row_stops_at_its_own_eos(model):
    free = generate(model, PROMPTS, eos_ids=NEVER, temperature=0)
    stopped = 0
    for eos_id in sorted({token for answer in free for token in answer})[::3]:
        expected = [answer[: answer.index(eos_id)] if eos_id in answer else answer for answer in free]
        assert generate(model, PROMPTS, eos_ids={eos_id}, temperature=0) == expected
        stopped += any(0 < len(cut) < len(answer) for cut, answer in zip(expected, free, strict=True))
    assert stopped > 3, "EOS in mid-answer should have been seen"


def test_any_of_several_eos_ends_a_row(model):
    free = generate(model, PROMPTS, eos_ids=NEVER, temperature=0)
    eos_ids = {answer[place] for answer, place in zip(free, (2, 3, 3, 5, 2), strict=True)}
    expected = [list(takewhile(lambda token: token not in eos_ids, answer)) for answer in free]
    assert len({answer[len(cut)] for answer, cut in zip(free, expected, strict=True) if len(cut) < len(answer)}) > 1
    assert generate(model, PROMPTS, eos_ids=eos_ids, temperature=0) == expected


def test_a_bare_base_generates():
    model = llama({**GQA, **SMALL})
    answers = generate(model, PROMPTS, eos_ids=NEVER, temperature=0, max_new_tokens=5)
    assert answers == [greedy_without_cache(model, prompt, NEVER, 5) for prompt in PROMPTS]


def test_the_allowance_ends_an_answer(model):
    free = generate(model, PROMPTS, eos_ids=NEVER, temperature=0)
    short = generate(model, PROMPTS, eos_ids=NEVER, temperature=0, max_new_tokens=7)
    assert short == [answer[:7] for answer in free]


def test_prompt_keys_and_values_are_computed_once(model, monkeypatch):
    calls, keys_values = [], Adaption.keys_values
    monkeypatch.setattr(Adaption, "keys_values", lambda self, *w: calls.append(self) or keys_values(self, *w))
    generate(model, PROMPTS, eos_ids=NEVER, temperature=0, max_new_tokens=11)
    assert calls == model.adaptions


def test_each_token_is_run_once_and_finished_rows_not_at_all(model):
    shapes = []
    model.tok_embeddings.register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape)))
    generate(model, PROMPTS, eos_ids=NEVER, temperature=0, max_new_tokens=6)
    assert shapes == [(1, 41), (1, 5), (1, 5), (1, 5), (1, 4), (1, 4)]


def test_a_prompt_that_fills_the_window_gets_no_answer(model):
    answers = generate(model, [[3] * WINDOW, [3]], eos_ids=NEVER, temperature=0, max_new_tokens=2)
    assert answers == [[], greedy_without_cache(model, [3], NEVER, 2)]
    assert generate(model, [[3] * WINDOW], eos_ids=NEVER) == [[]]
    assert generate(model, [], eos_ids=NEVER) == []


def test_training_goes_on_after_generating(model):
    before = generate(model, PROMPTS, eos_ids=NEVER, temperature=0, max_new_tokens=3)
    ids = tokens(2, 11)
    model(ids, ids).backward()
    assert all(a.prompt.grad.count_nonzero() and a.gate.grad.count_nonzero() for a in model.adaptions)
    with torch.no_grad():
        for adaption in model.adaptions:
            adaption.gate.neg_()
    after = generate(model, PROMPTS, eos_ids=NEVER, temperature=0, max_new_tokens=3)
    assert after != before, "nothing of the old adapter may be remembered"
    assert after == [greedy_without_cache(model, prompt, NEVER, 3) for prompt in PROMPTS]


def test_a_row_draws_the_same_whatever_shares_its_batch(model):
    settings = {"eos_ids": NEVER, "temperature": 1.0, "top_p": 0.9, "seed": 5}
    together = generate(model, PROMPTS, **settings)
    assert together == generate(model, PROMPTS, **settings)
    assert together[:4] == [generate(model, [prompt], **settings)[0] for prompt in PROMPTS[:4]]
    backwards = generate(model, PROMPTS[:4][::-1], **settings)
    assert backwards[::-1] == together[:4]
    assert together[0] != together[4], "the same prompt asked twice gets two answers"
    assert together != generate(model, PROMPTS, **{**settings, "seed": 6})


def test_without_a_seed_the_global_generator_decides(model):
    settings = {"eos_ids": NEVER, "temperature": 1.0, "top_p": 1.0, "seed": None}
    torch.manual_seed(0)
    first, second = generate(model, PROMPTS, **settings), generate(model, PROMPTS, **settings)
    torch.manual_seed(0)
    assert generate(model, PROMPTS, **settings) == first
    assert first != second


@pytest.mark.parametrize("settings", [{"temperature": 1e-38}, {"temperature": 1.0, "top_p": 1e-9}], ids=str)
def test_cold_or_narrow_sampling_is_greedy(model, settings):
    greedy = generate(model, PROMPTS, eos_ids=NEVER, temperature=0)
    assert generate(model, PROMPTS, eos_ids=NEVER, **settings) == greedy


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], [2] * 24], {}, "prompt 1 has 24 tokens, the window holds 23"),
        ([[1], [], [2]], {}, "prompt 1 is empty"),
        ([[1, 2, 101]], {}, "prompt 0 holds token 101, the vocabulary has 101"),
        ([[1, -100]], {}, "prompt 0 holds token -100"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([[1]], {"temperature": -0.1}, "temperature must be 0 .* got -0.1"),
        ([[1]], {"temperature": float("nan")}, "temperature must be"),
        ([[1]], {"top_p": 0.0}, "top_p must be in .* got 0.0"),
        ([[1]], {"top_p": 75}, "top_p must be in .* got 75"),
    ],
)
def test_wrong_input_is_named(prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(llama({**MHA, **SMALL}), prompts, eos_ids=NEVER, **settings)
