"""The base of a config is opened with its own tokenizer, or the settings that would help are named."""

import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from adapter.errors import TokenizerError
from adapter.tokenizers.load import load_tokenizer
from rayjobs.errors import ConfigError
from rayjobs.models.base_model import BaseModelConfig
from rayjobs.storage.download import cached_path
from rayjobs.storage.paths import resolve_path, upload_file
from tests.adapter.base.gguf_files import write_gguf
from tests.adapter.base.test_gguf import build
from tests.adapter.tokenizers.test_gguf import sentence_piece_metadata
from tests.adapter.tokenizers.test_sentence_piece import train_model


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder without a tokenizer, beside a neighbour's."""
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    return tmp_path / "base"


def test_a_neighbours_tokenizer_is_not_used(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"base: neither tokenizer\.json nor .*; or set base\.tokenizer"):
        BaseModelConfig(path=str(base)).open()


def test_a_tokenizer_that_cannot_be_read_is_named(base: Path) -> None:
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"base/tokenizer\.json: not a Hugging Face tokenizer"):
        BaseModelConfig(path=str(base)).open()


@pytest.mark.parametrize("named", ["tokenizer.model", ""])
def test_a_tokenizer_may_be_named_by_file_or_folder(base: Path, named: str) -> None:
    _, path = BaseModelConfig(path=str(base), tokenizer=str(base.parent / named)).open()
    assert path == base.parent / named


def test_a_tokenizer_of_another_vocabulary_is_refused(base: Path, trained_llama: Path) -> None:
    larger = str(trained_llama / "tokenizer.model")
    with pytest.raises(TokenizerError, match=r"tokens, the base's vocabulary only 97"):
        BaseModelConfig(path=str(base), tokenizer=larger).open()
    with pytest.raises(TokenizerError, match=r"has only 97 tokens, the base's vocabulary 512: more than padding"):
        BaseModelConfig(path=str(trained_llama), tokenizer=str(base.parent)).open()


def test_a_gguf_file_is_a_base_with_its_own_tokenizer(tmp_path: Path, s3: str) -> None:
    """By path and by URL, of which each machine makes a copy."""
    model = build("llama", vocab_size=331, max_position_embeddings=53)
    source = train_model(tmp_path / "original.model", byte_fallback=True, vocab_size=331)
    path = write_gguf(tmp_path / "base.gguf", model, Kind.Q8_0, **sentence_piece_metadata(source))
    url = f"{s3}/models/base.gguf"
    upload_file(path, resolve_path(url))
    for given in (str(path), url):
        base = BaseModelConfig(path=given)
        checkpoint, tokenizer = base.open()
        assert str(tokenizer) == given
        assert load_tokenizer(cached_path(tokenizer)).vocab_size == checkpoint.config.vocab_size == 331
        prompt = "the cat sat"
        ids = load_tokenizer(source).encode(prompt, bos=True, eos=False)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(base.load(None, "cpu").logits([prompt])[0], expected, rtol=0, atol=1e-4)
