"""Text that is given out piece by piece against the text of all tokens."""

import random

import pytest

from adapter.engine.text_stream import TextStream
from adapter.tokenizers.load import load_tokenizer
from tests.adapter.tokenizers.samples import KINDS

TEXT = "naïve café — 東京 🙂👩‍👩‍👧 end. \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} é"


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(KINDS[request.param](tmp_path_factory.mktemp("tokenizer")))


def pieces(tokenizer, prompt, ids, stop=()):
    stream = TextStream(tokenizer, prompt, stop)
    found = []
    for token in ids:
        found.append(stream.push(token))
        if stream.stopped:
            break
    return [*found, stream.finish()]


def test_pieces_are_the_text_and_no_character_is_split(tokenizer):
    prompt = tokenizer.encode("A prompt:", bos=True, eos=False)
    ids = tokenizer.encode(TEXT * 5, bos=False, eos=False)
    found = pieces(tokenizer, prompt, ids)
    assert "".join(found) == tokenizer.continuation(prompt, ids)
    assert sum(map(bool, found)) > len(ids) / 5
    whole = tokenizer.continuation(prompt, ids)
    assert all(piece.count("\N{REPLACEMENT CHARACTER}") <= whole.count("\N{REPLACEMENT CHARACTER}") for piece in found)


@pytest.mark.parametrize("kind", ["llama3", "qwen", "unigram"])  # the others join bytes that spell nothing
def test_random_tokens_stream_as_they_read_in_the_end(kind, tmp_path):
    tokenizer, rng = load_tokenizer(KINDS[kind](tmp_path)), random.Random(0)
    for _ in range(40):
        size = tokenizer.vocab_size
        prompt = [rng.randrange(size) for _ in range(rng.randrange(1, 12))]
        ids = [rng.randrange(size) for _ in range(rng.randrange(1, 90))]
        assert "".join(pieces(tokenizer, prompt, ids)) == tokenizer.continuation(prompt, ids)


def test_a_text_ends_before_its_first_stop_string(tokenizer):
    prompt = tokenizer.encode("Q", bos=True, eos=False)
    ids = tokenizer.encode(" one two thr three four", bos=False, eos=False)
    whole = tokenizer.continuation(prompt, ids)
    for stop in (["three"], ["zzz", "two thr three", "thr th"], ["four!", "r"], ["five"]):
        found = pieces(tokenizer, prompt, ids, stop)
        ends = [(whole.find(one) + len(one), whole.find(one)) for one in stop if one in whole]
        assert "".join(found) == whole[: min(ends)[1] if ends else None]


def test_what_may_begin_a_stop_string_waits(tokenizer):
    ids = tokenizer.encode(" ab ac", bos=False, eos=False)
    stream = TextStream(tokenizer, [1], ["ab ad"])
    given = ""
    for token in ids:
        given += stream.push(token)
        assert not given.endswith(("a", "ab", "ab ", "ab a")) or given.endswith("ac")
    assert (given + stream.finish()).endswith("ab ac")
