"""The tokenizer in a GGUF file is the one that the model was converted from."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import tokenizers

from adapter.errors import TokenizerError
from adapter.tokenizers.base import Tokenizer
from adapter.tokenizers.load import load_tokenizer
from tests.adapter.base.gguf_files import add_value
from tests.adapter.tokenizers.samples import CORPUS, NASTY, llama3, qwen
from tests.adapter.tokenizers.test_sentence_piece import train_model

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def write_gguf(path: Path, model: str, tokens: list[str], types: list[int], **metadata: Any) -> Path:
    """A GGUF file with a tokenizer and nothing else."""
    writer = gguf.GGUFWriter(path, "llama")
    values = {"model": model, "tokens": tokens, "token_type": types, **metadata}
    for key, value in values.items():
        add_value(writer, f"tokenizer.ggml.{key}", value)
    add_value(writer, "tokenizer.chat_template", TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write_byte_level(path: Path, source: Path, **metadata: Any) -> Path:
    """Convert a folder's `tokenizer.json` of byte pairs."""
    values = json.loads((source / "tokenizer.json").read_text())
    added = {token["id"]: token for token in values["added_tokens"]}
    vocabulary = {id: text for text, id in values["model"]["vocab"].items()}
    vocabulary |= {id: token["content"] for id, token in added.items()}
    types = [{None: 1, True: 3, False: 4}[added.get(id, {}).get("special")] for id in sorted(vocabulary)]
    merges = [" ".join(pair) for pair in values["model"]["merges"]]
    return write_gguf(path, "gpt2", [vocabulary[id] for id in sorted(vocabulary)], types, merges=merges, **metadata)


def write_sentence_piece(path: Path, source: Path, **metadata: Any) -> Path:
    """Convert a SentencePiece model."""
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in sentence_piece_metadata(source).items()}
    return write_gguf(path, values.pop("model"), values.pop("tokens"), values.pop("token_type"), **values, **metadata)


def sentence_piece_metadata(source: Path) -> dict[str, Any]:
    """The metadata of a GGUF file that describes a SentencePiece model."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(source))
    ids = range(model.vocab_size())
    values = {
        "model": "llama",
        "tokens": [model.IdToPiece(i) for i in ids],
        "scores": [model.GetScore(i) for i in ids],
        "token_type": [
            2 if model.IsUnknown(i) else 3 if model.IsControl(i) else 6 if model.IsByte(i) else 1 for i in ids
        ],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def check_same(ours: Tokenizer, original: Tokenizer) -> None:
    assert ours.vocab_size == original.vocab_size
    assert (ours.bos_id, ours.eos_id) == (original.bos_id, original.eos_id)
    for text in NASTY:
        ids = ours.encode(text, bos=True, eos=True)
        assert ids == original.encode(text, bos=True, eos=True), text
        assert ours.encode_rendered(text) == original.encode_rendered(text), text
        assert ours.decode(ids) == original.decode(ids)


def test_llama_3s(tmp_path: Path) -> None:
    original = load_tokenizer(llama3(tmp_path / "folder"))
    roles = {"bos_token_id": original.bos_id, "eos_token_id": original.eos_id}
    ours = load_tokenizer(write_byte_level(tmp_path / "m.gguf", tmp_path / "folder", pre="llama-bpe", **roles))
    check_same(ours, original)
    assert ours.eos_ids == original.eos_ids
    assert ours.chat_template == TEMPLATE
    without = write_byte_level(tmp_path / "n.gguf", tmp_path / "folder", pre="llama-bpe", add_bos_token=False, **roles)
    assert load_tokenizer(without).bos_id is None


def test_qwens(tmp_path: Path) -> None:
    original = load_tokenizer(qwen(tmp_path / "folder"))
    roles = {"bos_token_id": 5, "eos_token_id": original.eos_id, "padding_token_id": original.pad_id}
    ours = load_tokenizer(
        write_byte_level(tmp_path / "m.gguf", tmp_path / "folder", pre="qwen2", add_bos_token=False, **roles)
    )
    check_same(ours, original)
    assert ours.eos_ids == original.eos_ids
    assert ours.pad_id == original.pad_id
    assert ours.bos_id is None


def test_smollms_splits_digits(tmp_path: Path) -> None:
    folder = qwen(tmp_path / "folder")
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "m.gguf", folder, pre="smollm", eos_token_id=403))
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    split = tokenizers.pre_tokenizers
    backend.pre_tokenizer = split.Sequence([split.Digits(individual_digits=True), split.ByteLevel(False)])
    backend.normalizer = None
    backend.encode_special_tokens = True
    for text in NASTY:
        assert tokenizer.encode(text, bos=True, eos=False) == backend.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece(tmp_path: Path, prefix: bool) -> None:
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": prefix}
    source = train_model(tmp_path / "o.model", lines=CORPUS, byte_fallback=True, vocab_size=431, **options)
    ours = load_tokenizer(write_sentence_piece(tmp_path / "m.gguf", source, add_space_prefix=prefix))
    check_same(ours, load_tokenizer(source))
    assert ours.unk_id == 0
    assert ours.chat_template == TEMPLATE


def test_what_users_defined_is_found_first(tmp_path: Path) -> None:
    """Gemma's runs of spaces and line breaks, which the file holds with real spaces."""
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}
    symbols = ["▁▁", "▁▁▁▁", "\n\n", "<start_of_turn>", "<end_of_turn>"]
    source = train_model(
        tmp_path / "o.model", lines=CORPUS, byte_fallback=True, vocab_size=431, user_defined_symbols=symbols, **options
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(source))
    ids = range(model.vocab_size())
    tokens = [model.IdToPiece(i) for i in ids]
    types = [2 if i == 0 else 3 if i < 3 else 4 if tokens[i] in symbols else 6 if model.IsByte(i) else 1 for i in ids]
    tokens = [text.replace("▁", " ") if text in symbols else text for text in tokens]
    scores = [model.GetScore(i) for i in ids]
    path = write_gguf(tmp_path / "m.gguf", "llama", tokens, types, scores=scores, bos_token_id=1, eos_token_id=2,
                      add_space_prefix=False)  # fmt: skip
    check_same(load_tokenizer(path), load_tokenizer(source))


def test_its_folder_can_be_named_but_other_tokenizers_count_more(tmp_path: Path) -> None:
    source = train_model(tmp_path / "o.model", byte_fallback=True, vocab_size=331)
    path = write_sentence_piece(tmp_path / "m.gguf", source)
    assert load_tokenizer(tmp_path).name == str(path)
    source.rename(tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).name == str(tmp_path / "tokenizer.model")
    assert load_tokenizer(path).name == str(path)


@pytest.mark.parametrize(
    ("model", "metadata", "message"),
    [
        ("bert", {}, r"tokenizer\.ggml\.model is 'bert'; supported are 'llama' .*; or name the tokenizer that"),
        ("gpt2", {"pre": "default", "merges": ["a b"]}, r"tokenizer\.ggml\.pre is 'default', a way to split"),
        ("gpt2", {"pre": "qwen2"}, r"its metadata lacks tokenizer\.ggml\.merges"),
        ("llama", {"token_type": [1, 1]}, "3 tokens have 2 types"),
    ],
)
def test_errors_name_the_file(tmp_path: Path, model: str, metadata: dict[str, Any], message: str) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", **{"model": model, "tokens": ["a", "b", "c"], "types": [2, 1, 1], **metadata}
    )
    with pytest.raises(TokenizerError, match=rf"m\.gguf: {message}"):
        load_tokenizer(path)


@pytest.mark.slow
def test_a_real_file(smollm2_gguf: Path, smollm2: Path) -> None:
    """transformers' reading joins ½ and ① to spaces; the model was trained with them as digits, which stand alone."""
    ours, theirs = load_tokenizer(smollm2_gguf), load_tokenizer(smollm2)
    for text in NASTY:
        text = "".join(c for c in text if c.isascii() or not unicodedata.category(c).startswith("N"))
        assert ours.encode(text, bos=True, eos=True) == theirs.encode(text, bos=True, eos=True), text
        assert ours.encode_rendered(text) == theirs.encode_rendered(text), text
    assert ours.chat_template == theirs.chat_template
    assert ours.special_tokens == theirs.special_tokens
