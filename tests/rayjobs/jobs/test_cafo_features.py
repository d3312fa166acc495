"""cafo-features: the store holds what the encoders say, is made once, restarts where it stopped, leaves test closed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cafo import fewshot
from cafo.encoders import load_encoder
from cafo.images import load_image
from rayjobs.config import load
from rayjobs.data.feature_store import FeatureStore, open_encoders
from rayjobs.jobs import cafo_features
from rayjobs.storage.files import read_jsonl
from tests.conftest import ROOT
from tests.rayjobs.cafo_dataset import make_dataset
from tests.waiting import wait_until

pytestmark = pytest.mark.ray


def settings(given: list[str], *more: str) -> cafo_features.Config:
    return load(
        cafo_features.Config, None, [*given, "shots=2", "seeds=[0,1]", "generated=2", "run.name=features", *more]
    )


def features(config: cafo_features.Config):
    _, lists = cafo_features.check(config)
    store = FeatureStore(
        encoders=open_encoders(config.encoders),
        settings=config.features,
        cache=config.run.cache_folder,
        workers=1,
        resources=config.scale.resources(),
    )
    return store.load(lists), {images.role: images for images in lists}


def parts(config: cafo_features.Config) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in config.run.cache_folder.glob("features/*/*.parquet")}


def test_the_store_holds_what_the_encoders_say_of_every_view(tmp_path: Path, busy_cluster: None) -> None:
    config = settings(make_dataset(tmp_path), "features.max_rejected_fraction=0.1")
    bad = tmp_path / "images" / "val" / "grey" / "003.png"
    bad.write_bytes(bad.read_bytes()[:60])
    shutil.rmtree(tmp_path / "images" / "test")
    result = cafo_features.run(config)
    assert (result["val_images"], result["generated_images"], result["rejected_images"]) == (19, 8, 1)
    (reject,) = read_jsonl(config.run.folder / "rejected.jsonl")
    assert (reject["role"], reject["path"]) == ("val", "val/grey/003.png")
    assert "cannot be decoded" in reject["reason"]

    before = parts(config)
    found, lists = features(config)
    assert parts(config) == before  # nothing was encoded twice
    dataset = config.data.open()
    for seed in (0, 1):
        choice = fewshot.choose(dataset.train, dataset.class_names, shots=2, seed=seed)
        assert set(choice.items) <= set(lists["train"].items)
    for name, encoder in config.encoders.items():
        loaded = load_encoder(encoder)
        for role, images in lists.items():
            values = found[role].values[name]
            assert values.shape == (3 if images.views else 1, len(found[role].rows), loaded.width)
            for at in (0, len(found[role].rows) - 1):
                item = images.items[found[role].rows[at]]
                image = load_image(images.root / item.path)
                for view in range(len(values)):
                    prepared = loaded.preprocess.view(image, item.path, view, 0) if images.views else None
                    pixels = loaded.preprocess(image) if prepared is None else prepared
                    expected = loaded.encode_image(pixels[None])[0].numpy()
                    np.testing.assert_allclose(values[view, at], expected, rtol=0, atol=1e-5)


def test_a_restart_makes_the_missing_parts_only_and_another_encoder_its_own(tmp_path: Path, cluster: None) -> None:
    given = make_dataset(tmp_path, {"train": 12, "val": 24})
    config = settings(given, "shots=12", "seeds=[0]")
    one = settings([g for g in given if ".dino." not in g], "shots=12", "seeds=[0]")
    features(one)
    first = parts(one)
    assert len(first) >= 5
    found, _ = features(config)
    assert {path: stamp for path, stamp in parts(config).items() if path in first} == first
    lost = sorted(first)[1]
    content = lost.read_bytes()
    lost.unlink()
    again, _ = features(config)
    assert lost.read_bytes() == content
    assert {path for path, stamp in parts(config).items() if first.get(path, stamp) != stamp} == {lost}
    for role in found:
        for name in found[role].values:
            np.testing.assert_array_equal(found[role].values[name], again[role].values[name])
    changed = tmp_path / "images" / "val" / "grey" / "000.png"
    shutil.copy(tmp_path / "images" / "val" / "grey" / "001.png", changed)
    other, _ = features(config)  # the same names, another content
    assert not np.array_equal(other["val"].values["clip"], found["val"].values["clip"])
    for path in (tmp_path / "images" / "val").rglob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read, over"):
        features(config)


@pytest.mark.slow
def test_a_killed_run_keeps_its_parts(tmp_path: Path, cluster: None) -> None:
    given = make_dataset(tmp_path, {"train": 50, "val": 20})
    more = ["shots=50", "seeds=[0]", "generated=0", "run.name=killed", "features.views=8"]
    command = [sys.executable, "-m", "rayjobs", "cafo-features", *given, *more]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    config = settings(given, *more)
    wait_until(lambda: len(parts(config)) >= 4, "four parts")
    process.kill()
    process.wait()
    kept = parts(config)
    assert 4 <= len(kept) < 54  # of 27 for each of two encoders
    assert cafo_features.run(config)["train_images"] == 200
    now = parts(config)
    assert len(now) == 54
    assert {path: now[path] for path in kept} == kept
