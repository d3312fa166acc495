"""The tokenizer keeps text, control pieces, padding and ignored labels apart, and complains in words."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece

from adapter.errors import TokenizerError
from adapter.loss import IGNORE
from adapter.tokenizers.base import Tokenizer
from adapter.tokenizers.load import load_tokenizer

LINES = ["the cat sat on the mat", "a dog ran after the cat", "she sells sea shells"] * 5


def train_model(path: Path, *, lines: Sequence[str] = LINES, **options) -> Path:
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines), model_writer=file, hard_vocab_limit=False, minloglevel=2,
            **{"model_type": "bpe", "vocab_size": 61, "byte_fallback": False, **options},
        )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_model(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def test_round_trip_and_control_pieces(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    bare = tokenizer.encode("the dog sat", bos=False, eos=False)
    assert tokenizer.encode("the dog sat", bos=True, eos=True) == [tokenizer.bos_id, *bare, tokenizer.eos_id]
    assert tokenizer.decode([tokenizer.bos_id, *bare, tokenizer.eos_id]) == "the dog sat"
    assert tokenizer.encode("", bos=True, eos=False) == [tokenizer.bos_id]
    assert tokenizer.eos_id not in tokenizer.encode("</s> the", bos=False, eos=False)


def test_pad_ignore_and_unk_differ(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    ids = tokenizer.encode("the Ω", bos=False, eos=False)
    assert tokenizer.unk_id in ids
    assert tokenizer.pad_id != tokenizer.unk_id
    assert 0 <= tokenizer.pad_id < tokenizer.vocab_size
    assert not 0 <= IGNORE < tokenizer.vocab_size


def test_own_pad_piece_is_used(tmp_path: Path) -> None:
    assert load_tokenizer(train_model(tmp_path / "padded.model", pad_id=3)).pad_id == 3


def test_pickles_without_its_file(tmp_path: Path) -> None:
    path = train_model(tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)  # the folder will do
    data = pickle.dumps(tokenizer)
    path.unlink()
    again = pickle.loads(data)
    assert again.encode("the cat", bos=True, eos=True) == tokenizer.encode("the cat", bos=True, eos=True)
    assert again.sha256 == tokenizer.sha256


def test_fits(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    tokenizer.check_fits(tokenizer.vocab_size)
    with pytest.raises(TokenizerError, match=rf"{tokenizer.vocab_size} tokens.*only {tokenizer.vocab_size - 1}"):
        tokenizer.check_fits(tokenizer.vocab_size - 1)


@pytest.mark.parametrize(
    ("pieces", "rows", "fits"),
    [
        (32_000, 32_000, True),
        (32_000, 32_001, True),  # a pad token
        (32_000, 32_064, True),  # padded to a multiple of 64
        (32_000, 32_768, True),  # padded to a multiple of 1,024, for devices that share it
        (50_257, 50_304, True),
        (128_000, 128_256, True),
        (97, 128, True),
        (32_000, 31_999, False),
        (32_000, 49_152, False),
        (32_000, 64_000, False),
        (32_000, 128_256, False),
        (97, 512, False),
        (512, 1_000, False),
    ],
)
def test_a_base_has_as_many_rows_as_pieces_and_padding(
    model: Path, monkeypatch: pytest.MonkeyPatch, pieces: int, rows: int, fits: bool
) -> None:
    tokenizer = load_tokenizer(model)
    monkeypatch.setattr(type(tokenizer), "vocab_size", pieces)
    if fits:
        tokenizer.check_fits(rows)
    else:
        with pytest.raises(TokenizerError, match=rf"{pieces} tokens.*{rows}.*use the tokenizer that came with"):
            tokenizer.check_fits(rows)


@pytest.mark.parametrize("bad", [-1, IGNORE])
def test_decode_refuses_what_is_no_id(model: Path, bad: int) -> None:
    with pytest.raises(TokenizerError, match=f"{bad} is no id"):
        load_tokenizer(model).decode([5, bad])


def test_rows_past_the_pieces_have_no_text(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    ids = tokenizer.encode("the cat", bos=True, eos=False)
    assert tokenizer.decode([tokenizer.vocab_size, *ids, tokenizer.vocab_size + 5]) == "the cat"
    assert tokenizer.decode([]) == ""


def test_errors_name_the_file(model: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"absent\.model: no tokenizer"):
        load_tokenizer(tmp_path / "absent.model")
    for name, content in (("junk.model", b"junk" * 50), ("cut.model", model.read_bytes()[:200])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TokenizerError, match=f"{name}: not a SentencePiece model"):
            load_tokenizer(tmp_path / name)
    (tmp_path / "empty.model").touch()
    with pytest.raises(TokenizerError, match=r"empty\.model: the file is empty"):
        load_tokenizer(tmp_path / "empty.model")
    (tmp_path / "lfs.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n")
    with pytest.raises(TokenizerError, match=r"lfs\.model: a Git LFS pointer instead of the file; run `git lfs pull`"):
        load_tokenizer(tmp_path / "lfs.model")


def test_a_model_without_bos_adds_none_and_one_without_eos_says_so_where_it_is_needed(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train_model(tmp_path / "no_bos.model", bos_id=-1))
    assert tokenizer.bos_id is None
    assert tokenizer.encode("the cat", bos=True, eos=False) == tokenizer.encode("the cat", bos=False, eos=False)
    tokenizer = load_tokenizer(train_model(tmp_path / "no_eos.model", eos_id=-1))
    assert tokenizer.eos_ids == frozenset()
    assert tokenizer.encode("the cat", bos=True, eos=False)[0] == tokenizer.bos_id
    assert 0 <= tokenizer.pad_id < tokenizer.vocab_size
    with pytest.raises(TokenizerError, match=r"no_eos\.model: defines no EOS token"):
        tokenizer.encode("the cat", bos=True, eos=True)


@pytest.mark.slow
def test_a_real_tokenizer_of_llamas_kind(mistral_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(mistral_tokenizer)
    assert (tokenizer.vocab_size, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (32_000, 0, 1, 2)
    assert tokenizer.pad_id == tokenizer.eos_id
    check_byte_fallback(tokenizer)
    assert tokenizer.encode("Hello world", bos=True, eos=False) == [1, 22557, 1526]


def test_byte_fallback_spells_what_has_no_piece(tmp_path: Path) -> None:
    path = train_model(tmp_path / "tokenizer.model", byte_fallback=True, vocab_size=331)
    check_byte_fallback(load_tokenizer(path))


def check_byte_fallback(tokenizer: Tokenizer) -> None:
    text = "Below is an instruction — ünïcode, 漢字 🙂 Response:"
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert tokenizer.unk_id not in ids
    assert tokenizer.decode(ids) == text
