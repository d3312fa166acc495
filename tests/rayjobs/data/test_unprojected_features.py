"""What comes before CLIP's projection is stored beside the embeddings, in the same pass over the images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from cafo.datasets import Item
from cafo.errors import EncoderError
from rayjobs.data import feature_store
from rayjobs.data.config import FeaturesConfig
from rayjobs.data.feature_decoding import PartTask, decode_part
from rayjobs.data.feature_encoding import PartEncoder
from rayjobs.data.feature_store import FeatureStore, open_encoders, open_projection
from rayjobs.data.image_list import ImageList
from rayjobs.models.encoder import EncoderInfo, VisionEncoderConfig, load_vision_encoder
from tests.rayjobs.cafo_dataset import make_encoders

BEFORE = "clip before projection"


def encode_here(
    tasks: Sequence[PartTask],
    encoders: Mapping[str, EncoderInfo],
    batch: int,
    workers: int,
    resources: Mapping[str, float],
) -> None:
    """Do in this process what Ray Data's workers do."""
    encoder = PartEncoder(encoders, batch, "cpu")
    for task in tasks:
        table = pa.Table.from_pylist([task.to_row()])
        encoder(decode_part(table, {name: info.preprocess for name, info in encoders.items()}))


@pytest.fixture
def encoders(tmp_path: Path) -> dict[str, VisionEncoderConfig]:
    return {name: VisionEncoderConfig(**given) for name, given in make_encoders(tmp_path / "encoders").items()}


@pytest.mark.parametrize("views", [0, 2])
def test_features_before_the_projection_are_those_of_the_encoder(
    encoders: dict[str, VisionEncoderConfig], views: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (37, 41, 3), np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    monkeypatch.setattr(feature_store, "encode_parts", encode_here)
    monkeypatch.setattr(feature_store, "VIEWS_PER_PART", 2)  # the last part has no image that can be read
    items = tuple(Item(f"{i}.png", 0, "a") for i in (0, 1, 2, 4, 3))
    images = ImageList(role="train", root=tmp_path, items=items, views=views)
    infos = open_encoders(encoders, {"clip"})
    assert list(infos) == ["clip", BEFORE, "dino"]
    settings = FeaturesConfig(views=2, max_rejected_fraction=0.5)
    store = FeatureStore(encoders=infos, settings=settings, cache=tmp_path, workers=1, resources={})
    found = store.load([images])["train"]
    assert found.rows == (0, 1, 2, 3)
    weight, bias = open_projection("clip", infos["clip"])
    before = torch.from_numpy(found.values[BEFORE])
    projected = F.normalize(F.linear(before, weight, bias), dim=-1)
    torch.testing.assert_close(projected, torch.from_numpy(found.values["clip"]), rtol=1e-4, atol=1e-5)
    if not views:
        encoder = load_vision_encoder(encoders["clip"])
        one = encoder.preprocess(Image.open(tmp_path / "4.png").convert("RGB"))[None]
        torch.testing.assert_close(before[0, 3:], encoder.encode_unprojected(one), rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
    assert len({path.parent for path in tmp_path.rglob("part-*.parquet")}) == 3


def test_an_encoder_without_a_projection_is_named(encoders: dict[str, VisionEncoderConfig]) -> None:
    with pytest.raises(EncoderError, match=r"encoders\.dino is .*no CLIP and has no last projection"):
        open_encoders(encoders, {"dino"})
