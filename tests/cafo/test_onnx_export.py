"""The exported graph in onnxruntime against the classifier, on images that it was not traced with."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cafo.cache import Cache
from cafo.calibration import Calibration
from cafo.encoder_spec import EncoderSpec
from cafo.encoders import ImageEncoder, load_encoder
from cafo.ensemble import Ensemble
from cafo.errors import EncoderError
from cafo.images import Preprocess
from cafo.model import CaFo
from tests.cafo.test_encoders import RESNET, VIT, folder

M, N = 13, 5


def make_model(place: Path, config: dict = RESNET, **changes) -> CaFo:
    """A classifier with random keys, of a CLIP and of the image itself."""
    place.mkdir()
    specs = {
        "clip": EncoderSpec(kind="clip", weights=str(folder(place, config))),
        "pixels": EncoderSpec(kind="pixels", name="8"),
    }
    encoders = {name: load_encoder(spec) for name, spec in specs.items()}
    rng = torch.Generator().manual_seed(3)
    keys = {n: torch.nn.functional.normalize(torch.randn(M, e.width, generator=rng)) for n, e in encoders.items()}
    cache = Cache(
        keys=keys,
        labels=torch.arange(M) % N,
        classifier=torch.nn.functional.normalize(torch.randn(encoders["clip"].width, N, generator=rng), dim=0),
        class_names=tuple("abcde"),
        alpha=2.5,
        beta=3.5,
        calibration=Calibration(temperature=3.7, scores=torch.zeros(1)),
    )
    return CaFo(replace(cache, **changes), encoders)


def run(path: Path, model: CaFo, images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    kinds = json.loads(session.get_modelmeta().custom_metadata_map["preprocess"])
    feed = {}
    for given in session.get_inputs():
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in kinds[given.name].items()}
        feed[given.name] = torch.stack([Preprocess(**fields)(image) for image in images]).numpy()
    return session.run(["logits", "probabilities"], feed)


@pytest.mark.parametrize("config", [RESNET, pytest.param(VIT, marks=pytest.mark.slow)], ids=["resnet", "vit"])
def test_the_graph_gives_the_classifiers_logits_and_probabilities(tmp_path: Path, config: dict) -> None:
    model = make_model(tmp_path / "clip", config)
    path = tmp_path / "model.onnx"
    assert model.export_onnx(path) <= 1e-4
    rng = np.random.default_rng(0)
    for count in (1, 7):
        images = [Image.fromarray(rng.integers(0, 255, (37, 41 + i, 3), np.uint8)) for i in range(count)]
        logits, probabilities = run(path, model, images)
        expected = model.logits(images)
        assert float(expected.std(dim=1).min()) > 0.5
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)
        own = torch.softmax(expected / 3.7, dim=-1)
        torch.testing.assert_close(torch.from_numpy(probabilities), own, rtol=0, atol=1e-4)


def test_an_encoder_that_cannot_be_exported_names_the_operator(tmp_path: Path) -> None:
    class Network(torch.nn.Module):
        def forward(self, pixels):
            return torch.linalg.svdvals(pixels).flatten(1)

    kind = Preprocess(size=8, resize=8)
    model = make_model(tmp_path / "clip", ensemble=Ensemble(baseline="nothing", sources=("pixels",)))
    model.encoders["pixels"] = ImageEncoder(Network(), name="odd", preprocess=kind)
    width = model.encoders["pixels"].width
    model.cache = replace(model.cache, keys={**model.cache.keys, "pixels": torch.randn(M, width)})
    with pytest.raises(EncoderError, match=r"encoder pixels cannot be exported to ONNX: .* aten\._linalg_svd"):
        model.export_onnx(tmp_path / "model.onnx")
    half = torch.nn.Linear(3, 2).bfloat16()
    model.encoders["pixels"].network = half
    with pytest.raises(EncoderError, match="pixels is in bf16"):
        model.export_onnx(tmp_path / "model.onnx")
    assert not list(tmp_path.glob("*.onnx"))
