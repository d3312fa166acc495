"""A folder of photos is checked through a fitted classifier: labels that were swapped, copies, other classes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cafo import CaFo, EncoderSpec, FitConfig
from cafo.inspection.folder import inspect_folder
from cafo.key_training import KeyTraining
from tests.cafo.test_encoders import RESNET, folder

COLOURS = {"red": (220, 30, 30), "green": (40, 200, 60), "blue": (40, 60, 220)}


def test_a_folder_is_checked(tmp_path: Path) -> None:
    rng, photos = np.random.default_rng(0), tmp_path / "photos"
    for name, colour in COLOURS.items():
        (photos / name).mkdir(parents=True)
        for i in range(5):
            pixels = np.clip(np.array(colour) + rng.normal(0, 30, (23, 29, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(photos / name / f"{i}.png")
    wrong, copy = photos / "red" / "blue.png", photos / "green" / "copy.png"
    (photos / "blue" / "0.png").rename(wrong)
    copy.write_bytes((photos / "green" / "1.png").read_bytes())
    (tmp_path / "clip").mkdir()
    specs = {
        "clip": EncoderSpec(kind="clip", weights=str(folder(tmp_path / "clip", RESNET))),
        "dino": EncoderSpec(kind="timm", name="test_resnet", weights="random:1"),
    }
    config = FitConfig(views=1, training=KeyTraining(epochs=0), select="leave_one_out")
    model = CaFo.fit(photos, specs, shots=None, config=config)

    found = inspect_folder(model, photos)
    assert len(found.paths) == 16
    groups = dict(zip(found.paths, found.images.groups_of(found.cache).tolist(), strict=True))
    assert groups[copy] == groups[photos / "green" / "1.png"], "neither votes for the other"
    assert len(set(groups.values())) == 15
    first = found.label_errors()[0]
    assert (first.path, first.label, first.suggested) == (wrong, "red", "blue")
    assert first.margin < 0
    pairs = found.near_duplicates(0.99999)
    assert {pairs[0].first, pairs[0].second} == {copy, photos / "green" / "1.png"}
    assert [found.paths[i] for c in found.confusions() for i in c.images if c.label == 2] == [wrong]

    (photos / "yellow").mkdir()
    Image.new("RGB", (5, 5), (200, 200, 0)).save(photos / "yellow" / "0.png")
    with pytest.raises(ValueError, match=r"has other classes than the classifier \(added: 'yellow'\)"):
        inspect_folder(model, photos)
