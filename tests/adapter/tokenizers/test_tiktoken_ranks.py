"""Llama 3's ranks give the ids of tiktoken's own encoder, and its special tokens those of the model's release."""

import base64
import json
import random
from pathlib import Path

import pytest
import tiktoken

from adapter.errors import TokenizerError
from adapter.tokenizers.load import load_tokenizer
from adapter.tokenizers.tiktoken_ranks import PATTERN, byte_letters
from tests.adapter.tokenizers.samples import NASTY, train_byte_level

UNREACHABLE = (b" unreachable", "漢字漢字".encode(), b"zqzqzq")
"""Whole pieces that no joins lead to, as 678 of Llama 3's."""


def ranks() -> dict[bytes, int]:
    """Tokens by rank, trained here: the bytes first, in the order of their letters, then joins in their order."""
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    vocabulary = train_byte_level(PATTERN, ()).get_vocab()
    tokens = [bytes(byte_of[letter] for letter in text) for text in sorted(vocabulary, key=vocabulary.__getitem__)]
    return {token: rank for rank, token in enumerate((*tokens, *UNREACHABLE))}


def write_ranks(folder: Path) -> Path:
    path = folder / "tokenizer.model"
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks().items())
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ranks(tmp_path_factory.mktemp("ranks"))


def test_ids_equal_tiktokens(path: Path) -> None:
    ours = load_tokenizer(path)
    theirs = tiktoken.Encoding("test", pat_str=PATTERN, mergeable_ranks=ranks(), special_tokens={})
    draw = random.Random(0)
    pieces = ["a", "aa", "aaa", " ", "\n", "the", "漢", "🙂", "\u0301", "sea", "1", "'s", "x", "unreachable", "zq"]
    fuzz = ["".join(draw.choices(pieces, k=draw.randint(1, 23))) for _ in range(997)]
    for text in (*NASTY, *fuzz, "an unreachable 漢字漢字 zqzqzq zqzqzqz"):
        assert ours.encode(text, bos=False, eos=False) == theirs.encode_ordinary(text), text
        assert ours.decode(ours.encode(text, bos=True, eos=True)) == text
    for token in UNREACHABLE:
        assert ours.encode(token.decode(), bos=False, eos=False) == [ranks()[token]]


def test_special_tokens_are_those_of_3_1_or_by_its_parameters_of_3_0(path: Path, tmp_path: Path) -> None:
    first = len(ranks())
    later = load_tokenizer(path)
    assert later.vocab_size == first + 256
    assert (later.bos_id, later.eos_id) == (first, first + 1)
    assert later.eos_ids == {first + 1, first + 8, first + 9}
    assert special_ids(later) == {0: "begin_of_text", 2: "reserved_special_token_0", 4: "finetune_right_pad_id",
        6: "start_header_id", 7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag",
        12: "reserved_special_token_2", 255: "reserved_special_token_245"}  # fmt: skip

    folder = tmp_path / "3.1"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps({"dim": 8, "use_scaled_rope": True}))
    assert special_ids(load_tokenizer(write_ranks(folder))) == special_ids(later)

    (tmp_path / "params.json").write_text(json.dumps({"dim": 8}))
    first_release = load_tokenizer(write_ranks(tmp_path).parent)
    assert first_release.eos_ids == {first + 1, first + 9}
    assert special_ids(first_release) == {0: "begin_of_text", 2: "reserved_special_token_0", 4:
        "reserved_special_token_2", 6: "start_header_id", 7: "end_header_id", 8: "reserved_special_token_4",
        9: "eot_id", 10: "reserved_special_token_5", 12: "reserved_special_token_7",
        255: "reserved_special_token_250"}  # fmt: skip


def special_ids(tokenizer) -> dict[int, str]:
    """Some special tokens by their places, each found in a rendered text."""
    names = {id: text for text, id in tokenizer._special_ids.items()}
    first = tokenizer.bos_id
    for id, text in names.items():
        assert tokenizer.encode_rendered(text).ids == [id]
        assert id not in tokenizer.encode(text, bos=False, eos=False)
    return {place: names[first + place].strip("<|>") for place in (0, 2, 4, 6, 7, 8, 9, 10, 12, 255)}


def test_a_dialog(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    rendered = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi <|eot_id|><|eot_id|>"
    said = rendered.index("hi ")
    ids, spans = tokenizer.encode_rendered(rendered, [(said, said + len("hi <|eot_id|>"))])
    first = tokenizer.bos_id
    assert [id - first for id in ids if id >= first] == [0, 6, 7, 9]
    assert "".join(rendered[low:high] for low, high in spans) == rendered
    assert tokenizer.decode(ids) == "user\n\nhi <|eot_id|>"


def test_a_hugging_face_folder_lists_its_own_special_tokens(tmp_path: Path) -> None:
    write_ranks(tmp_path)
    first = len(ranks())
    tokens = {str(first + i): {"content": f"<|{name}|>", "special": True} for i, name in enumerate(("begin", "end"))}
    config = {"added_tokens_decoder": tokens, "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [first + 1, 7]}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (first, first + 1, {first + 1, 7})
    assert tokenizer.vocab_size == first + 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("IQ== 0\nnot base64 1\n", "line 2 is b'not base64 1', not a token in base64 and its rank"),
        ("IQ== 0\nI!== 1\n", "line 2 is"),
        ("IQ== 0\nIg== 2\n", r"line 2 has rank '2', not 1; lines are lost"),
        ("IQ== 0\nIg== 1\n", r"has no token for the byte b'\\x00'"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_text(content)
    with pytest.raises(TokenizerError, match=rf"tokenizer\.model: {message}"):
        load_tokenizer(path)
