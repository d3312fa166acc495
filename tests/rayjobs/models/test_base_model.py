"""The base of a config is opened with its own tokenizer, or the settings that would help are named."""

import shutil
from pathlib import Path

import pytest

from adapter.errors import TokenizerError
from rayjobs.errors import ConfigError
from rayjobs.models.base_model import BaseModelConfig


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
