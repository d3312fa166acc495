"""Damaged files of the cache are named with the way out."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from rayjobs.data.image_source import read_part
from rayjobs.data.text_classifier import prepare_classifier
from rayjobs.storage.files import write_parquet
from rayjobs.storage.fingerprint import fingerprint


@pytest.mark.parametrize("length", [0, 40, -8])
def test_a_feature_file_that_was_cut_short_is_named(tmp_path: Path, length: int) -> None:
    path = tmp_path / "part-00000000.parquet"
    write_parquet(path, pa.table({"row": np.arange(90), "features": np.arange(90.0)}))
    assert len(read_part(path)) == 90
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(
        ValueError, match=r"part-00000000\.parquet is no whole feature file .*delete it, and the next run"
    ):
        read_part(path)


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
