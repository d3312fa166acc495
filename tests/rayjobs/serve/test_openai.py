"""OpenAI's own client against the application, whose answers are those of one model alone."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from adapter import AdaptedModel
from rayjobs.serve.text_model import TextModel
from tests.conftest import WORDS
from tests.rayjobs.serve.serving import ADAPTERS, alone, to_float64
from tests.waiting import wait_until

NAMES = ["tiny", *ADAPTERS]
QUESTION = "the red house"


@pytest.fixture(scope="module")
def models(tiny_base: Path, runs: Path) -> dict[str, AdaptedModel]:
    """Each model alone."""
    return {name: alone(tiny_base, runs, None if name == "tiny" else name) for name in NAMES}


def test_the_base_and_its_adapters_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == NAMES
    assert client.models.retrieve("sweep/chat").id == "sweep/chat"


def test_64_mixed_requests_at_once_are_answered_as_each_is_alone(
    client: openai.OpenAI, models: dict[str, AdaptedModel]
) -> None:
    """Conversations and completions, streamed or not, over all adapters, in one batch."""
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "the cat"}]

    def question(number: int) -> str:
        return " ".join(random.Random(number).choices(WORDS, k=1 + number % 9))

    def ask(number: int) -> str:
        name, chat, stream = NAMES[number % 4], number % 3 > 0, number % 5 > 2
        text = question(number)
        if chat:
            messages: Any = [*turns[: number % 2 * 2], {"role": "user", "content": text}]
            answer: Any = client.chat.completions.create(
                model=name, messages=messages, max_tokens=5 + number % 7, temperature=0, stream=stream
            )
            if stream:
                return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            return answer.choices[0].message.content
        answer = client.completions.create(
            model=name, prompt=text, max_tokens=5 + number % 7, temperature=0, stream=stream
        )
        return "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text

    def expect(number: int) -> str:
        model, text = models[NAMES[number % 4]], question(number)
        if number % 3 == 0:
            return model.generate(text, max_new_tokens=5 + number % 7, temperature=0)[0]
        messages = [*turns[: number % 2 * 2], {"role": "user", "content": text}]
        return model.chat(messages, max_new_tokens=5 + number % 7, temperature=0)

    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(ask, range(64)))
    assert found == [expect(number) for number in range(64)]
    assert len(set(found)) > 40


def test_usage_finish_and_stop(client: openai.OpenAI, models: dict[str, AdaptedModel]) -> None:
    prompt = models["tiny"].tokenizer.encode(QUESTION, bos=True, eos=False)
    answer = client.completions.create(model="tiny", prompt=QUESTION, max_tokens=20, temperature=0)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 20)
    assert answer.choices[0].finish_reason == "length"
    whole = answer.choices[0].text
    word = whole.split()[2]
    stopped = client.completions.create(model="tiny", prompt=QUESTION, max_tokens=20, temperature=0, stop=[word])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (whole[: whole.index(word)], "stop")


def test_a_seed_gives_the_same_samples_and_n_different_ones(client: openai.OpenAI) -> None:
    def sample(**settings: Any) -> list[str]:
        answer = client.chat.completions.create(
            model="plain", messages=[{"role": "user", "content": QUESTION}], max_completion_tokens=9, **settings
        )
        return [choice.message.content or "" for choice in answer.choices]

    first = sample(seed=7, n=3)
    assert first == sample(seed=7, n=3)
    assert len(set(first)) == 3
    assert sample(seed=8) != first[:1]
    assert sample(seed=7, n=2, extra_body={"top_k": 1}) == sample(temperature=0, n=2)


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    asked: Any = {
        "model": "sweep/chat",
        "messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
        "max_tokens": 13,
        "seed": 3,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in mine) == choice.message.content
        assert [one.finish_reason for one in mine if one.finish_reason] == [choice.finish_reason]
        entries = [entry for one in mine if one.logprobs for entry in one.logprobs.content or []]
        assert choice.logprobs is not None
        assert entries == choice.logprobs.content
        assert "".join(entry.token for entry in entries).strip() == choice.message.content


def test_log_probabilities_are_those_of_the_plain_forward(
    client: openai.OpenAI, models: dict[str, AdaptedModel]
) -> None:
    model = models["plain"]
    answer = client.completions.create(
        model="plain", prompt=[QUESTION, "the cat"], max_tokens=6, temperature=0, logprobs=3, echo=True
    )
    for prompt, choice in zip([QUESTION, "the cat"], answer.choices, strict=True):
        (new,) = model.generate(prompt, max_new_tokens=6, temperature=0)
        assert choice.text == prompt + new
        ids = model.tokenizer.encode(prompt, bos=True, eos=False)
        logprobs: Any = choice.logprobs
        assert len(logprobs.tokens) == len(ids) + 6
        assert "".join(logprobs.tokens) == choice.text
        assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:i])) for i in range(len(ids) + 6)]
        expected = to_float64(model.logits(prompt)[0])
        picked = expected[torch.arange(len(ids) - 1), ids[1:]].tolist()
        assert logprobs.token_logprobs[0] is None
        assert logprobs.token_logprobs[1 : len(ids)] == pytest.approx(picked, abs=1e-4)
        best = expected[:-1].max(-1).values.tolist()
        assert [max(top.values()) for top in logprobs.top_logprobs[1 : len(ids)]] == pytest.approx(best, abs=1e-4)


def test_log_likelihoods_as_evaluation_harnesses_ask_for_them(
    client: openai.OpenAI, models: dict[str, AdaptedModel]
) -> None:
    """A batch of ids, an echo and one more token, whose log-probability is dropped, also where it ends the text."""
    model = models["sweep/chat"]
    sequences = [model.tokenizer.encode(text, bos=True, eos=True) for text in (QUESTION, "the cat sat", "a hill")]
    answer = client.completions.create(
        model="sweep/chat", prompt=sequences, max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
    )
    for ids, choice in zip(sequences, answer.choices, strict=True):
        logprobs: Any = choice.logprobs
        found = logprobs.token_logprobs[2:-1]
        logits = model.model(torch.tensor([ids]))[0]
        expected = to_float64(logits)[torch.arange(1, len(ids) - 1), ids[2:]].tolist()
        assert found == pytest.approx(expected, abs=1e-4)
    (nothing,) = client.completions.create(model="tiny", prompt=QUESTION, max_tokens=0, logprobs=0, echo=True).choices
    assert (nothing.text, nothing.finish_reason) == (QUESTION, "length")


REFUSED: dict[str, tuple[type[openai.APIStatusError], dict[str, Any], str]] = {
    "unknown model": (openai.NotFoundError, {"model": "../plain"}, "model_not_found"),
    "window": (openai.BadRequestError, {"prompt": "the cat " * 99}, "context_length_exceeded"),
    "far too long": (openai.BadRequestError, {"prompt": [[3] * 500]}, "context_length_exceeded"),
    "tokens": (openai.BadRequestError, {"max_tokens": 121}, "invalid_value"),
    "choices": (openai.BadRequestError, {"n": 41}, "invalid_value"),
    "no prompts": (openai.BadRequestError, {"prompt": []}, "invalid_value"),
    "vocabulary": (openai.BadRequestError, {"prompt": [5000]}, "invalid_value"),
    "type": (openai.BadRequestError, {"temperature": "warm"}, "invalid_type"),
    "range": (openai.BadRequestError, {"top_p": 1.5}, "invalid_value"),
    "unsupported": (openai.BadRequestError, {"presence_penalty": 0.5}, "unsupported_parameter"),
    "size": (openai.APIStatusError, {"prompt": "x" * 20_000}, "body_too_large"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_answered_is_refused_in_openais_shape(client: openai.OpenAI, name: str) -> None:
    kind, wrong, code = REFUSED[name]
    asked = {"model": "tiny", "prompt": QUESTION, **wrong}
    with pytest.raises(kind) as refused:
        client.post("/completions", body=asked, cast_to=object)
    assert refused.value.code == code
    assert isinstance(refused.value.body, dict)
    assert set(refused.value.body) == {"message", "type", "param", "code"}


def test_what_fails_in_a_stream_is_told_there(
    client: openai.OpenAI, text_model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = client.completions.create(model="tiny", prompt=QUESTION, max_tokens=100, temperature=0, stream=True)
    chunks = iter(stream)
    next(chunks)
    monkeypatch.setattr("rayjobs.serve.completions._Answer.go_on", lambda *_: 1 / 0)
    with pytest.raises(openai.APIError, match="failed on this request"):
        list(chunks)
    wait_until(lambda: not text_model.engine.busy, "the request that failed leaves")
