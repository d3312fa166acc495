"""A saved classifier gives the logits that were chosen, for every method, and a damaged file is named."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cafo.errors import CafoError
from cafo.methods import METHODS, find_method
from cafo.methods.base import Features
from cafo.methods.choice import fit_and_choose
from cafo.methods.saved import FORMAT, FewShotClassifier, TrainingFile, load_classifier, save_classifier
from tests.cafo.methods import problem
from tests.cafo.methods.test_choice import SHORTER


def classifier(name, seed=3):
    """A method that has been fitted and chosen by a cross-fit."""
    train, _, _ = problem.images(seed=seed)
    method = SHORTER.get(name, METHODS[name])
    chosen = fit_and_choose(method, train, "crossfit", seed=seed)
    return FewShotClassifier(
        name=name,
        method=method,
        fitted=chosen.fitted,
        setting=chosen.setting,
        class_names=tuple("abcde"),
        source="clip",
        encoders={"clip": "CLIP-1"},
        images=(TrainingFile("a/1.png", "a", "f00"), TrainingFile("b/ü.png", "b", "")),
        seed=seed,
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_method_gives_the_same_logits(name, tmp_path):
    before = classifier(name)
    save_classifier(before, tmp_path / "one.safetensors")
    after = load_classifier(tmp_path / "one.safetensors")
    _, others, _ = problem.images(seed=3)
    expected = before.fitted.terms(others)(before.setting)
    got = after.fitted.terms(others)(after.setting)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    for field in ("name", "method", "setting", "class_names", "source", "encoders", "images", "seed"):
        assert getattr(after, field) == getattr(before, field), field
    read = others.unprojected if name == "ProLIP" else others.embeddings
    logits = after.logits({"clip": read, "dino": torch.zeros(problem.B, 3)})
    torch.testing.assert_close(logits, expected.logits(before.setting["alpha"]), rtol=0, atol=0)
    with pytest.raises(CafoError, match=f"{re.escape(name)} needs features of clip"):
        after.logits({"dino": others.embeddings})


def test_a_saved_method_is_one_setting_and_not_the_images(tmp_path):
    save_classifier(classifier("Tip-Adapter-F"), tmp_path / "one.safetensors")
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
        header = file.metadata()
    images = problem.N * problem.SHOTS
    assert shapes == {"classifier": (problem.C, problem.N), "labels": (images,), "keys": (images, problem.C)}
    assert (header["format"], header["method"], json.loads(header["encoders"])) == (
        FORMAT,
        "Tip-Adapter-F",
        {"clip": "CLIP-1"},
    )


def test_many_images_are_predicted_block_by_block(tmp_path):
    one = classifier("GDA")
    rows = torch.randn(2 * 2048 + 3, problem.C, generator=torch.Generator().manual_seed(0))
    whole = one.fitted.terms(Features(embeddings=rows))(one.setting).logits(one.setting["alpha"])
    torch.testing.assert_close(one.logits({"clip": rows}), whole)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "one.safetensors"
    with pytest.raises(CafoError, match="no classifier at"):
        load_classifier(path)
    save_classifier(classifier("GDA"), path)
    whole = path.read_bytes()
    with safe_open(path, "pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path.write_bytes(whole[:-7])
    with pytest.raises(CafoError, match=rf"no whole {FORMAT} file"):
        load_classifier(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CafoError, match="Git LFS pointer"):
        load_classifier(path)
    for changed_tensors, changed_header, message in (
        (tensors, {"format": "cafo-cache-1"}, f"not a {FORMAT} file"),
        (tensors, {"method": "GDB"}, "there is no method 'GDB'"),
        (tensors, {"setting": "{"}, f"no whole {FORMAT} file"),
        ({**tensors, "biases": tensors["biases"] / 0}, {}, "biases hold NaN or infinity"),
        ({"weights": tensors["weights"]}, {}, f"no whole {FORMAT} file .*classifier"),
    ):
        save_file(changed_tensors, path, {**header, **changed_header})
        with pytest.raises(CafoError, match=message):
            load_classifier(path)


def test_constants_can_be_changed_at_any_depth():
    coarse = find_method("ape", {"gamma_steps": 3, "grid": {"beta_steps": 7}})
    assert (coarse.gamma_steps, coarse.grid.beta_steps, coarse.grid.beta_high) == (3, 7, 7.0)
    assert coarse.channels == METHODS["APE"].channels
    assert find_method("RLA", {"penalties": [1, 0.5]}).penalties == (1.0, 0.5)
    for name, constants, message in (
        ("GDA", {"alpha": 1}, "GDA has no constant 'alpha'; it has alpha_powers"),
        ("APE", {"grid": {"steps": 1}}, "APE: grid has no constant 'steps'"),
        ("APE", {"gamma_steps": "many"}, "APE: gamma_steps: .*integer"),
        ("Tip-Adapter", {"grid": {"beta_steps": 0}}, "leaves no value to try"),
        ("nearest class mean", {"k": 1}, "it has none"),
    ):
        with pytest.raises(CafoError, match=message):
            find_method(name, constants)
