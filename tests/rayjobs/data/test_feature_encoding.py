"""Crops are made once for encoders that crop alike, and normalised for each; encoders share the cores."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from cafo.images import load_image
from rayjobs.cluster.capacity import Capacity
from rayjobs.data import feature_encoding
from rayjobs.data.feature_decoding import PartTask, decode_part
from rayjobs.data.feature_encoding import PartEncoder, encoder_threads
from rayjobs.data.feature_part import read_part
from rayjobs.data.feature_store import open_encoders
from rayjobs.models.encoder import VisionEncoderConfig, load_vision_encoder
from rayjobs.storage.counted_reader import CountedReader
from tests.rayjobs.cafo_dataset import make_encoders


@pytest.mark.parametrize("views", [0, 3])
def test_features_are_those_of_each_encoders_own_preprocessing(tmp_path: Path, views: int) -> None:
    rng, names = np.random.default_rng(0), ["0.png", "1.png"]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (37, 53, 3), np.uint8)).save(tmp_path / name)
    given = {**make_encoders(tmp_path / "encoders"), "pixels": {"kind": "pixels", "name": "32"}}
    configs = {name: VisionEncoderConfig(**one) for name, one in given.items()}
    infos = open_encoders(configs)
    outputs = {name: str(tmp_path / f"{name}.parquet") for name in infos}
    task = PartTask(
        root=str(tmp_path), first=0, paths=names, views=views, seed=5, min_area=0.5, flips=True, outputs=outputs
    )
    decoded = decode_part(
        pa.Table.from_pylist([task.to_row()]), {name: info.preprocess for name, info in infos.items()}
    )
    sizes = [len(decoded[f"pixels{i}"][0].as_buffer()) for i in range(3)]
    bytes_of = {name: 2 * max(1, views) * 3 * info.preprocess.size**2 for name, info in infos.items()}
    assert infos["clip"].preprocess != infos["pixels"].preprocess  # though they crop alike
    assert sizes == [bytes_of["clip"], bytes_of["dino"], 0]
    PartEncoder(infos, 2, "cpu")(decoded)
    for name, config in configs.items():
        encoder, reader = load_vision_encoder(config), CountedReader()
        images = [(name, load_image(tmp_path / name)) for name in names]
        pixels = [
            encoder.preprocess.view(image, path, number, 5) if views else encoder.preprocess(image)
            for path, image in images
            for number in range(max(1, views))
        ]
        expected = encoder.encode_image(torch.stack(pixels)).reshape(2, max(1, views), -1)
        got = torch.tensor(read_part(outputs[name], reader).read(reader))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("present", "off"), [(5.0, ()), (2.0, ({"CPU": 1.0}, {"CPU": 2.0}, {"memory": 1.0}))])
def test_encoders_share_the_cores_also_those_of_machines_that_are_off(
    present: float, off: tuple[dict[str, float], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_encoding.ray, "cluster_resources", lambda: {"CPU": present})
    monkeypatch.setattr(feature_encoding, "cluster_capacity", lambda: Capacity(nodes=(), lost=off))
    assert [encoder_threads(workers) for workers in (1, 2, 5, 9)] == [5, 2, 1, 1]
