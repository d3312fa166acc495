"""Damaged files of the cache are named with the way out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rayjobs.data import text_classifier
from rayjobs.data.feature_part import read_part, write_part
from rayjobs.data.feature_store import open_encoders
from rayjobs.data.text_classifier import prepare_classifier
from rayjobs.models.encoder import VisionEncoderConfig, load_vision_encoder
from rayjobs.storage.counted_reader import CountedReader
from rayjobs.storage.fingerprint import fingerprint
from tests.rayjobs.cafo_dataset import make_dataset


@pytest.mark.parametrize("length", [0, 40, -8])
def test_a_feature_file_that_was_cut_short_is_named(tmp_path: Path, length: int) -> None:
    path, reader = tmp_path / "part-00000000.parquet", CountedReader()
    features = np.arange(60, dtype=np.float32).reshape(30, 2)
    write_part(str(path), [*range(4), *range(5, 16)], features, 2, [("4.png", "broken")])
    part = read_part(str(path), reader)
    assert (part.images, part.rejected) == ((0, 1, 2, 3, *range(5, 16)), (("4.png", "broken"),))
    assert np.array_equal(part.read(reader), features.reshape(15, 2, 2))
    for file in (path.with_suffix(".bin"), path):
        file.write_bytes(file.read_bytes()[:length])
        with pytest.raises(ValueError, match=rf"{file.name} .*delete the folder {tmp_path}, and the next run"):
            read_part(str(path), reader).read(reader)
    with pytest.raises(ValueError, match=r"part-00000000\.bin was cut short.*delete the folder"):
        part.read_rows([3, 14], reader)


def test_a_classifier_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    class Info:
        clip, identity = True, "CLIP"

    prompts = {"ant": ["an ant"]}
    name = fingerprint(["classifier", 1, "CLIP", [["ant", ["an ant"]]]])[:20]
    path = tmp_path / "classifiers" / f"{name}.safetensors"
    path.parent.mkdir()
    info: Any = Info()
    save_file({"weights": torch.eye(3)}, path, {"sentences": "1", "truncated": "0"})
    assert prepare_classifier(info, prompts, ["ant"], tmp_path, {}).weights.shape == (3, 3)
    for content in (path.read_bytes()[:50], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"safetensors is no whole classifier file .*delete it, and the next run"):
            prepare_classifier(info, prompts, ["ant"], tmp_path, {})


def test_the_sentences_of_a_classifier_are_kept_when_they_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path)
    encoders = json.loads((tmp_path / "encoders.json").read_text())
    (info,) = open_encoders({"clip": VisionEncoderConfig(**encoders["clip"])}).values()
    prompts, names = {"ant": ["an ant", "an insect", "ants"], "bee": ["a bee", "a wasp"]}, ["bee", "ant"]
    written: list[bool] = []

    class Task:
        def options(self, **_: Any) -> "Task":
            return self

        def remote(self, *given: Any) -> list[int]:
            written.append(given[-1])
            return list(text_classifier._write_classifier(*given))

    monkeypatch.setattr(text_classifier.ray, "remote", lambda function: Task())
    monkeypatch.setattr(text_classifier.ray, "get", lambda reference: reference)
    monkeypatch.setattr(text_classifier, "encoder_threads", lambda workers: 1)
    alone = prepare_classifier(info, prompts, names, tmp_path, {"CPU": 1})
    assert alone.embeddings is None
    for _ in range(2):
        both = prepare_classifier(info, prompts, names, tmp_path, {"CPU": 1}, each=True)
    assert written == [False, True]  # each file is made once
    encoder = load_vision_encoder(VisionEncoderConfig(**encoders["clip"]))
    for label, texts in enumerate((["a bee", "a wasp", "a bee"], ["an ant", "an insect", "ants"])):
        expected = torch.cat([encoder.encode_text([text]) for text in texts])  # type: ignore[attr-defined]
        torch.testing.assert_close(both.embeddings[label], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(alone.weights, both.weights)
    assert (alone.store, alone.sentences) == (both.store, 5)
    (path,) = (tmp_path / "classifiers").glob("*-sentences.safetensors")
    path.write_bytes(path.read_bytes()[:70])
    with pytest.raises(ValueError, match=r"-sentences\.safetensors is no whole classifier file"):
        prepare_classifier(info, prompts, names, tmp_path, {}, each=True)
