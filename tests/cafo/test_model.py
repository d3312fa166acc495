"""CaFo as one object on a folder of images: better than chance, the parts' own formula, the same from its file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cafo import CaFo, EncoderSpec, FitConfig, load_tree
from cafo.fewshot import FewShot
from cafo.images import load_image
from cafo.items import Item
from cafo.key_training import KeyTraining
from cafo.model import _train_images
from tests.cafo.test_encoders import RESNET, folder

COLOURS = {"red_thing": (200, 40, 40), "green": (40, 180, 60), "blue": (50, 60, 210)}
TRAINING = KeyTraining(epochs=3, batch=8, seed=1)


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EncoderSpec]:
    clip = folder(tmp_path_factory.mktemp("clip"), RESNET)
    return {
        "clip": EncoderSpec(kind="clip", weights=str(clip)),
        "dino": EncoderSpec(kind="timm", name="test_resnet", weights="random:1"),
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for i in range(20):
            pixels = np.clip(np.array(colour) + rng.normal(0, 30, (23, 29, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def model(photos: Path, specs: dict[str, EncoderSpec]) -> CaFo:
    dataset = load_tree(photos, seed=1, shares=(0.5, 0.2))
    return CaFo.fit(dataset, specs, shots=2, seed=1, config=FitConfig(views=3, training=TRAINING))


def test_a_few_images_teach_the_classes(model: CaFo, photos: Path) -> None:
    dataset = load_tree(photos, seed=1, shares=(0.5, 0.2))
    test = dataset.open_test()
    predicted = model.predict([photos / item.path for item in test])
    assert len(test) > 10
    assert np.mean([p.class_name == item.class_name for p, item in zip(predicted, test, strict=True)]) > 0.8
    assert all(1 / 3 <= p.probability <= 1 for p in predicted)
    assert len(model.cache.labels) == 6
    of_keys = zip(model.cache.key_names, model.cache.labels.tolist(), strict=True)
    assert {(path, label) for path, label in of_keys} <= {(item.path, item.label) for item in dataset.train}
    assert len(set(model.cache.key_names)) == 6


def test_logits_are_those_of_the_cache_on_each_image_alone(model: CaFo, photos: Path) -> None:
    paths = [photos / name / "7.png" for name in COLOURS]
    images = [load_image(path) for path in paths]
    for image, row in zip(images, model.logits(paths), strict=True):
        alone = {
            name: encoder.encode_image(encoder.preprocess(image)[None]) for name, encoder in model.encoders.items()
        }
        # An untrained CLIP's predictions differ between classes by 4e-5 only, which z of eq. 8 stretches to 1: 1e-7
        # between a batch and a row becomes 0.01 in the logits, which are about 10.
        torch.testing.assert_close(model.cache.logits(alone)[0], row, rtol=0, atol=0.05)
    torch.testing.assert_close(model.logits(images), model.logits(paths))


def test_a_saved_model_gives_the_same_logits_and_refuses_other_encoders(
    model: CaFo, photos: Path, specs: dict, tmp_path: Path
) -> None:
    model.save(tmp_path / "pets.safetensors")
    paths = [photos / name / "3.png" for name in COLOURS]
    assert torch.equal(CaFo.load(tmp_path / "pets.safetensors", specs).logits(paths), model.logits(paths))
    with pytest.raises(ValueError, match="needs encoders called dino"):
        CaFo.load(tmp_path / "pets.safetensors", {"clip": specs["clip"]})
    other = {**specs, "dino": EncoderSpec(kind="timm", name="test_resnet", weights="random:2")}
    with pytest.raises(ValueError, match="keys of dino were made by"):
        CaFo.load(tmp_path / "pets.safetensors", other)


def test_errors_say_what_cannot_be_fitted(photos: Path, specs: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no validation image to choose on; give some, or choose by crossfit"):
        CaFo.fit(photos, specs, shots=1, config=FitConfig(views=1, select="val"))
    with pytest.raises(ValueError, match="must be a CLIP; dino is not"):
        CaFo.fit(photos, {"dino": specs["dino"]})
    with pytest.raises(ValueError, match=r"no sentence for 1 of 3 classes: red_thing"):
        CaFo.fit(photos, specs, shots=1, config=FitConfig(views=1, prompts={"green": ["green."], "blue": ["blue."]}))


def test_one_image_in_place_of_a_list_is_refused(model: CaFo, photos: Path) -> None:
    path = photos / "green" / "1.png"
    opened = load_image(path)
    array = np.asarray(opened)
    for image in (str(path), path, path.read_bytes(), opened, array, array[..., 0]):
        with pytest.raises(ValueError, match="images should be a list of images, got one"):
            model.predict(image)  # type: ignore[arg-type]
    batch = np.stack([array, array])
    expected = model.logits([path, path])
    assert torch.equal(model.logits(batch), expected)
    assert torch.equal(model.logits([opened, array]), expected)
    assert torch.equal(model.logits([path.read_bytes(), array / 255]), expected)


def test_sentences_are_lists(photos: Path, specs: dict) -> None:
    prompts = {"red_thing": ["red."], "green": "green.", "blue": ["blue."]}
    with pytest.raises(ValueError, match=r"'green' should have a list of sentences, got 'green\.'"):
        CaFo.fit(photos, specs, shots=1, config=FitConfig(views=1, prompts=prompts))


def test_one_class_is_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    for i in range(9):
        Image.new("RGB", (5, 7)).save(tmp_path / "only" / f"{i}.png")
    with pytest.raises(ValueError, match="has one class, and a classifier needs two"):
        CaFo.fit(tmp_path, {})


def test_a_folder_without_validation_images_gives_a_classifier_and_an_estimate(photos: Path, specs: dict) -> None:
    model = CaFo.fit(photos, specs, shots=None, config=FitConfig(views=2, training=TRAINING))
    assert len(model.cache.labels) == 60  # every label trains
    assert model.estimate is not None
    assert model.estimate.total == 60
    low, high = model.estimate.interval
    assert 0.5 < low < model.estimate.accuracy <= high <= 1
    one = CaFo.fit(photos, specs, shots=1, config=FitConfig(views=2, training=TRAINING))
    assert one.estimate is None  # no image can be held out
    assert one.cache.alpha > 0


def test_images_of_equal_content_are_one_group(tmp_path: Path) -> None:
    items = [Item(f"{number}.png", 0, "red") for number in range(4)]
    for item, red in zip(items, (10, 20, 10, 20), strict=True):
        Image.new("RGB", (5, 3), (red, 0, 0)).save(tmp_path / item.path)
    choice = FewShot(shots=3, seed=0, items=tuple(items[:3]), short={})  # the last one is generated
    images = _train_images({}, [(tmp_path, item) for item in items], choice)
    assert images.groups is not None
    assert (images.rows.tolist(), images.groups.tolist()) == ([0, 1, 2], [0, 1, 0, 1])
