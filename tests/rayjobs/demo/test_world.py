"""The demo's images and encoders: real scans as an ordinary data set, printed digits apart from them, folders that the
ordinary loaders read."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from cafo.datasets import load_split
from cafo.encoders import EncoderSpec, load_encoder
from cafo.prompt import read_prompts
from rayjobs.demo import font_digits
from rayjobs.demo.cache_dir import cache_folder
from rayjobs.demo.captions import PHRASES, descriptions
from rayjobs.demo.clip import train_clip
from rayjobs.demo.config import DigitsConfig, TinyClipConfig, TinyDinoConfig
from rayjobs.demo.digits import write_digits
from rayjobs.demo.dino import sinkhorn_knopp, train_dino
from rayjobs.demo.notes import NAMES
from rayjobs.demo.world import Training, train_model

FEW = DigitsConfig(train=30, val=20, test=10)


def test_scans_are_an_ordinary_data_set(tmp_path: Path) -> None:
    write_digits(FEW, tmp_path)
    dataset = load_split(tmp_path / "split.json", tmp_path)
    assert dataset.class_names == NAMES
    lists = [dataset.train, dataset.val, dataset.open_test()]
    assert [len(items) for items in lists] == [30, 20, 10]
    paths = [item.path for items in lists for item in items]
    assert len({*paths}) == 60
    scans = load_digits()
    for item in dataset.train:
        number = int(Path(item.path).stem)
        assert scans.target[number] == item.label
        small = np.asarray(Image.open(tmp_path / item.path).resize((8, 8), Image.Resampling.BOX), float) / 255 * 16
        assert np.corrcoef(small.ravel(), scans.images[number].ravel())[0, 1] > 0.97
    assert read_prompts(tmp_path / "prompts.json", NAMES) == descriptions()


def test_the_division_is_seeded_and_fits(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_digits(replace(FEW, seed=seed), tmp_path / name)
    read = [(tmp_path / name / "split.json").read_text() for name in "abc"]
    assert read[0] == read[1] != read[2]
    with pytest.raises(ValueError, match="there are 1797"):
        write_digits(DigitsConfig(train=1500, val=300, test=10), tmp_path / "d")


def test_every_font_has_ten_different_digits() -> None:
    drawn = font_digits.render_fonts()
    assert drawn.shape == (len(font_digits.FONTS), 10, 48, 48)
    apart = torch.cdist(drawn.flatten(2), drawn.flatten(2)) + 99 * torch.eye(10)
    assert apart.min() > 8  # of 48: boxes in place of digits would be equal
    rng = torch.Generator().manual_seed(0)
    pictures = font_digits.printed_digits(drawn, torch.arange(10), rng)
    assert pictures.shape == (10, font_digits.SIDE, font_digits.SIDE)
    assert 0 <= pictures.min() < 0.1 < 0.7 < pictures.max() <= 1


def test_every_digit_has_phrases_of_its_own() -> None:
    assert tuple(PHRASES) == NAMES
    every = [phrase for phrases in PHRASES.values() for phrase in phrases]
    assert len({*every}) == len(every)


def test_the_tiny_clip_is_an_ordinary_encoder(tmp_path: Path) -> None:
    settings = TinyClipConfig(steps=2, batch=6, width=8)
    for name in ("a", "b"):
        training = Training(cache_folder(tmp_path, name, 1), 2, partial(train_clip, settings))
        losses = list(train_model(training))
        assert len(losses) == 2
    encoders = [
        load_encoder(EncoderSpec(kind="clip", name="tiny", weights=str(cache_folder(tmp_path, n, 1)))) for n in "ab"
    ]
    assert encoders[0].identity == encoders[1].identity, "the same seed, the same model"
    assert encoders[0].encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 64)
    said = [sentence for listed in descriptions().values() for sentence in listed]
    assert not any(encoders[0].is_truncated(sentence) for sentence in said)  # type: ignore[union-attr]


def test_the_tiny_dino_is_an_ordinary_encoder(tmp_path: Path) -> None:
    settings = TinyDinoConfig(steps=2, batch=8)
    for name in "ab":
        losses = list(train_model(Training(cache_folder(tmp_path, name, 1), 2, partial(train_dino, settings, FEW))))
        assert len(losses) == 2
    encoders = [load_encoder(EncoderSpec(kind="timm", weights=str(cache_folder(tmp_path, name, 1)))) for name in "ab"]
    assert (encoders[0].width, encoders[0].preprocess.size) == (512, 32)
    assert encoders[0].identity == encoders[1].identity, "the same seed, the same model"


def test_sinkhorn_knopp_targets_are_distributions_that_use_all_prototypes() -> None:
    shares = sinkhorn_knopp(torch.randn(29, 7, generator=torch.Generator().manual_seed(0)) + torch.linspace(-3, 3, 7))
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(29))
    torch.testing.assert_close(shares.sum(dim=0), torch.full((7,), 29 / 7), atol=0.15, rtol=0)


def test_a_training_cut_off_leaves_nothing(tmp_path: Path) -> None:
    going = train_model(Training(cache_folder(tmp_path, "clip", 1), 9, partial(train_clip, TinyClipConfig(batch=6))))
    next(going)
    going.close()
    assert not list((tmp_path / "demo").iterdir())
