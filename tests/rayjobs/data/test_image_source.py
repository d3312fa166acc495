"""Image sources: images as they are or in views that change with the epoch; errors name the image."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rayjobs.cluster.worker_pool import WorkerPoolConfig
from rayjobs.config import load
from rayjobs.data.feature_part import part_name, write_part
from rayjobs.data.image_features import prepare_image_source
from rayjobs.data.image_source import ImageSource, StoredFeatures
from rayjobs.data.records import RecordsConfig
from rayjobs.jobs import adapter_train
from rayjobs.models.image_conditioning import ImageFeaturizer, VisionConfig
from rayjobs.storage.counted_reader import CountedReader
from rayjobs.storage.files import write_json, write_jsonl


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Records of an image that grows brighter from left to right."""
    row = np.linspace(0, 255, 60).astype(np.uint8)
    Image.fromarray(np.broadcast_to(row[:, None], (40, 60, 3)).copy()).save(tmp_path / "ramp.png")
    write_jsonl(tmp_path / "r.jsonl", [{"instruction": "i", "output": "o", "image": "ramp.png"}])
    write_json(tmp_path / "images.json", {"0": ["ramp.png"]})
    return tmp_path


def make_source(folder: Path, vision: list[str], *more: str) -> ImageSource:
    config = load(VisionConfig, None, [given.removeprefix("vision.") for given in (*vision, *more)])
    sources = RecordsConfig(path=[str(folder / "r.jsonl")]).sources()
    return prepare_image_source(config, config.open(), sources, folder / "images.json", folder, WorkerPoolConfig(), 5)


def pixels_of(source: ImageSource, epoch: int | None) -> np.ndarray:
    (content,) = source.open(CountedReader()).read([(0, 0)], epoch)
    return np.frombuffer(content, np.float32).reshape(3, 32, 32)


def test_augmentation_shows_other_pixels_in_every_epoch_and_mirrors_only_with_flips(
    folder: Path, vision: list[str]
) -> None:
    plain = pixels_of(make_source(folder, vision, "mode=streamed"), 1)
    augmented = make_source(folder, vision, "mode=streamed", "augment=true")
    views = [pixels_of(augmented, epoch) for epoch in range(24)]
    assert np.array_equal(views[3], pixels_of(augmented, 3))
    assert np.array_equal(pixels_of(augmented, None), plain), "validation uses the image as it is"
    assert len({view.tobytes() for view in [plain, *views]}) > 20
    assert all(np.all(np.diff(view[0, 9]) >= 0) for view in views), "brighter to the right: never mirrored"
    assert min(map(np.ptp, views)) < 0.75 * max(map(np.ptp, views))

    large = make_source(folder, vision, "mode=streamed", "augment=true", "min_area=0.85", "flips=true")
    views = [pixels_of(large, epoch) for epoch in range(24)]
    assert {bool(np.all(np.diff(view[0, 9]) <= 0)) for view in views} == {True, False}
    assert min(map(np.ptp, views)) > 0.8 * max(map(np.ptp, views))


def test_the_plan_says_that_images_are_left_out(
    folder: Path, tiny_base: Path, vision: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"base.path={tiny_base}", f"data.path=[{folder}/r.jsonl]", "adapter.n_layers=1", "run.name=r"]
    adapter_train.plan(load(adapter_train.Config, None, given))
    assert re.search(r"images +left out, of 1 records: there is no vision section", capsys.readouterr().out)
    adapter_train.plan(load(adapter_train.Config, None, [*given, *vision]))
    assert re.search(r"images +1, stored", capsys.readouterr().out)


def test_an_encoder_reads_batches_of_the_configured_size(vision: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    conditioning = load(VisionConfig, None, [given.removeprefix("vision.") for given in (*vision, "batch=3")]).open()
    featurizer, read = ImageFeaturizer(conditioning.encoder, "cpu"), []
    multi_scale = featurizer.encoder.multi_scale
    monkeypatch.setattr(
        featurizer.encoder, "multi_scale", lambda batch, n: (read.append(len(batch)), multi_scale(batch, n))[1]
    )
    pixels = list(np.random.default_rng(0).normal(size=(7, 3 * 32 * 32)).astype(np.float32))
    features = featurizer.features([one.tobytes() for one in pixels])
    assert read == [3, 3, 1]
    whole = torch.cat(multi_scale(torch.tensor(np.stack(pixels)).view(7, 3, 32, 32)), dim=1)
    torch.testing.assert_close(features, whole)


def test_a_missing_image_is_named(folder: Path, vision: list[str]) -> None:
    streamed = make_source(folder, vision, "mode=streamed")
    (folder / "ramp.png").unlink()
    with pytest.raises(ValueError, match=r"ramp\.png: cannot be decoded"):
        streamed.open(CountedReader()).read([(0, 0)], None)
    write_part(str(folder / part_name(0)), [1], np.array([[1, 2]], np.float32), 1, [])
    stored = StoredFeatures(folders={0: folder}, lists=folder / "images.json").open(CountedReader())
    (content,) = stored.read([(0, 1)], None)
    assert np.frombuffer(content, np.float32).tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"ramp\.png: could be read when"):
        stored.read([(0, 0)], None)


def test_only_the_wanted_features_are_read(folder: Path) -> None:
    rng = np.random.default_rng(0)
    tables = {number: rng.normal(size=(64, 5)).astype(np.float32) for number in (0, 64)}
    for first, table in tables.items():
        write_part(str(folder / part_name(first)), range(first, first + 64), table, 1, [])
    reader = CountedReader()
    source = StoredFeatures(folders={3: folder}, lists=folder / "images.json").open(reader)
    wanted = [(3, 70), (3, 2), (3, 127), (3, 2), (3, 3)]
    for _ in range(2):
        found = np.stack([np.frombuffer(content, np.float32) for content in source.read(wanted, 1)])
        assert np.array_equal(found, np.concatenate([tables[0], tables[64]])[[70, 2, 127, 2, 3]])
    indexes = sum((folder / part_name(first)).stat().st_size for first in tables)
    assert reader.bytes == indexes + 2 * 4 * 5 * 4, "each index once; of the features four rows a time"


def test_the_bytes_of_a_streamed_image_are_counted(folder: Path, vision: list[str]) -> None:
    reader = CountedReader()
    make_source(folder, vision, "mode=streamed").open(reader).read([(0, 0), (0, 0)], None)
    assert reader.bytes == 2 * (folder / "ramp.png").stat().st_size
