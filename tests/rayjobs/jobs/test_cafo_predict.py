"""cafo-predict against `CaFo.predict`, image by image; resumed, with broken images, and refused where it must be."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from cafo.cache import Cache, save_cache
from cafo.calibration import Calibration
from cafo.encoder_spec import EncoderSpec
from cafo.ensemble import NOTHING, Ensemble
from cafo.images import load_image
from cafo.methods import METHODS
from cafo.methods.base import Features, FewShotImages
from cafo.methods.choice import fit_and_choose
from cafo.methods.saved import FewShotClassifier, save_classifier
from cafo.model import CaFo
from rayjobs.__main__ import main
from rayjobs.config import load
from rayjobs.data.image_reading import read_pixels
from rayjobs.inference.prediction import COUNTS, Predicting, Predictor
from rayjobs.job_configs.cafo_predict import Config
from rayjobs.jobs import cafo_predict
from rayjobs.models.encoder import load_vision_encoder
from rayjobs.storage.files import read_json, read_jsonl, read_parquet, write_json
from rayjobs.storage.paths import resolve_path, upload_file
from rayjobs.tune.classifier import open_chosen
from rayjobs.tune.search_space import Setting
from rayjobs.tune.selection import ChosenSetting, ChosenTrial
from tests.rayjobs.cafo_dataset import CLASSES, make_encoders
from tests.rayjobs.conftest import upload
from tests.rayjobs.data.test_image_collection import png, write_tar

M = 12


def make_cache(encoders: dict[str, Any]) -> Cache:
    """A cache whose keys are the features of some images, so that it gives other images several classes."""
    rng = torch.Generator().manual_seed(3)
    images = [load_image(png(100 + number)) for number in range(M)]
    keys = {n: e.encode_image(torch.stack([e.preprocess(image) for image in images])) for n, e in encoders.items()}
    return Cache(
        keys=keys,
        labels=torch.arange(M) % len(CLASSES),
        classifier=torch.randn(keys["clip"].shape[1], len(CLASSES), generator=rng) / 1000,
        class_names=tuple(CLASSES),
        encoders={name: encoder.identity for name, encoder in encoders.items()},
        alpha=2.5,
        beta=50.0,
        calibration=Calibration(temperature=1.7, scores=torch.rand(30, generator=rng).sort().values),
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders, a saved classifier, and images of every kind of source, some of which are broken."""
    folder = tmp_path_factory.mktemp("predict")
    specs = make_encoders(folder / "encoders")
    (folder / "encoders.json").write_text(json.dumps(specs))
    encoders = {name: load_vision_encoder(EncoderSpec(**spec)) for name, spec in specs.items()}
    save_cache(make_cache(encoders), folder / "model.safetensors")
    photos = folder / "photos"
    photos.mkdir()
    for number in range(7):
        (photos / f"{number}.png").write_bytes(png(number))
    (photos / "broken.png").write_bytes(png(1)[:90])
    write_tar(photos / "some.tar", [10, 11, 12])
    pq.write_table(pa.table({"image": [png(20), b"none", png(22)], "id": [1, 2, 3]}), photos / "rows.parquet")
    return folder


def settings(place: Path, *more: str) -> Config:
    specs = json.loads((place / "encoders.json").read_text())
    given = [f"encoders.{name}.{key}={value}" for name, spec in specs.items() for key, value in spec.items()]
    given += [f"classifier={place / 'model.safetensors'}", f"data.path={place / 'photos'}", "images_per_shard=2"]
    return load(Config, None, [*given, f"run.storage={place / 'runs'}", "top=3", *more])


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The job without Ray: its workers' own functions in this process. The list holds how many shards may be made."""
    left = [10**6]

    def predict_units(units: Sequence[Any], classifier: Any, calibration: Any, how: Predicting, total: Any) -> int:
        kinds = list(dict.fromkeys(info.preprocess for info in how.encoders.values()))
        predictor, images = Predictor(classifier, calibration, how, "cpu"), 0
        for unit in units:
            table = pa.table({"unit": [unit.to_json()]})
            for shard in read_pixels(table, kinds, how.per_shard, f"{how.output.folder}/{COUNTS}"):
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                images += predictor(shard)["images"][0].as_py()
        return images

    monkeypatch.setattr(cafo_predict, "predict_units", predict_units)
    monkeypatch.setattr(cafo_predict, "connect", lambda *folders: None)
    return left


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "predictions").iterdir())


def rows_of(folder: Path) -> list[dict[str, Any]]:
    tables = [pq.read_table(path) if path.suffix == ".parquet" else pa.csv.read_csv(path) for path in shards(folder)]
    return [row for table in tables for row in table.to_pylist()]


CONTENTS: dict[str, Callable[[], bytes]] = {
    **{f"{n}.png": lambda n=n: png(n) for n in range(8)},
    **{f"{n:04d}.png": lambda n=n: png(n) for n in range(10, 14)},
    "row 0": lambda: png(20),
    "row 2": lambda: png(22),
}


def check(rows: list[dict[str, Any]], model: CaFo, coverage: float | None = None) -> None:
    """Every row is what the library predicts of its image."""
    images = [CONTENTS[row["path"]]() for row in rows]
    for row, prediction in zip(rows, model.predict(images, top=3, coverage=coverage), strict=True):
        assert [row[f"class_{k}"] for k in (1, 2, 3)] == [name for name, _ in prediction.top]
        # tiny untrained encoders differ little between images, and z of eq. 8 stretches that with its last bits
        values = [row[f"probability_{k}"] for k in (1, 2, 3)]
        assert values == pytest.approx([value for _, value in prediction.top], abs=0.01)
        assert row["margin"] == pytest.approx(prediction.margin, abs=0.01)
        if coverage is not None:
            made = row["prediction_set"]
            assert (json.loads(made) if isinstance(made, str) else made) == list(prediction.prediction_set)


def open_model(place: Path) -> CaFo:
    specs = json.loads((place / "encoders.json").read_text())
    return CaFo.load(place / "model.safetensors", {name: EncoderSpec(**spec) for name, spec in specs.items()})


READABLE = {*(f"{n}.png" for n in range(7)), "0010.png", "0011.png", "0012.png", "row 0", "row 2"}


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_an_interrupted_run_goes_on_and_predicts_what_was_added(place: Path, local: list[int], form: str) -> None:
    config = settings(place, f"run.name={form}", f"format={form}", "coverage=0.8")
    folder, model = config.run.folder, open_model(place)
    for made in (2, 3):
        local[0] = made
        with pytest.raises(KeyboardInterrupt):
            cafo_predict.run(config)
    before = {path: path.stat().st_mtime_ns for path in shards(folder)}
    assert len(before) == 5
    local[0] = 10**6
    result = cafo_predict.run(config)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    rows = rows_of(folder)
    assert sorted(row["path"] for row in rows) == sorted(READABLE)
    check(rows, model, coverage=0.8)
    assert len({row["class_1"] for row in rows}) > 1
    rejected = read_jsonl(folder / "rejected.jsonl")
    assert sorted(row["path"] for row in rejected) == ["broken.png", "row 1"]
    assert all("cannot be decoded" in row["reason"] for row in rejected)
    sizes = [len(json.loads(r["prediction_set"]) if form == "csv" else r["prediction_set"]) for r in rows]
    assert result["mean_set_size"] == pytest.approx(np.mean(sizes), abs=1e-3)
    assert (result["images"], result["rejected_images"]) == (12, 2)
    counted = Counter(row["class_1"] for row in rows)
    ranked = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    assert [(row["class"], row["images"]) for row in result["predicted_classes"]] == ranked
    local[0] = 0  # nothing is left
    assert cafo_predict.run(config)["predicted_now"] == 0
    local[0] = 1
    (place / "photos" / "7.png").write_bytes(png(7))
    try:
        assert cafo_predict.run(config)["images"] == 13
    finally:
        (place / "photos" / "7.png").unlink()
    check(rows_of(folder), model, coverage=0.8)


def test_a_bucket_is_read_and_written_as_a_folder_is(place: Path, local: list[int], bucket: str) -> None:
    """Interrupted there too, and taken up again."""
    upload(place / "photos", f"{bucket}/photos")
    upload_file(place / "model.safetensors", resolve_path(f"{bucket}/model.safetensors"))
    paths = [f"classifier={bucket}/model.safetensors", f"data.path={bucket}/photos", f"run.storage={bucket}/runs"]
    there, here = settings(place, *paths, "run.name=there"), settings(place, "run.name=here")
    local[0] = 2
    with pytest.raises(KeyboardInterrupt):
        cafo_predict.run(there)
    local[0] = 10**6
    results = [cafo_predict.run(config) for config in (there, here)]
    assert [one["predicted_classes"] for one in results] == [results[0]["predicted_classes"]] * 2
    found = []
    for config in (there, here):
        rows = [row | {"source": ""} for file in shards(config.run.folder) for row in read_parquet(file).to_pylist()]
        found.append(sorted(rows, key=lambda row: row["path"]))
    assert found[0] == found[1]
    assert len(found[0]) == 12
    kept = [read_jsonl(config.run.folder / "rejected.jsonl") for config in (there, here)]
    assert [row["path"] for row in kept[0]] == [row["path"] for row in kept[1]] == ["broken.png", "row 1"]


def test_rejected_images_are_tried_again_where_that_is_asked(place: Path, local: list[int]) -> None:
    listed = place / "list.csv"
    listed.write_text("path\nphotos/1.png\nlater.png\n")
    given = [f"data.path={listed}", "run.name=retry"]
    assert cafo_predict.run(settings(place, *given))["rejected_images"] == 1
    (place / "later.png").write_bytes(png(3))
    local[0] = 0
    assert cafo_predict.run(settings(place, *given))["rejected_images"] == 1
    local[0] = 1
    result = cafo_predict.run(settings(place, *given, "retry_rejected=true"))
    assert (result["images"], result["rejected_images"]) == (2, 0)


def test_what_does_not_fit_is_refused(place: Path, local: list[int], tmp_path: Path) -> None:
    config = settings(place, "run.name=a")
    with pytest.raises(ValueError, match=r"reads encoders that are not given: set encoders\.dino"):
        cafo_predict.plan(replace(config, encoders={"clip": config.encoders["clip"]}))
    other = ["run.name=a", "encoders.dino.weights=random:7"]
    with pytest.raises(ValueError, match=r"encoders\.dino: .* was fitted with .* put back the weights"):
        cafo_predict.run(settings(place, *other))
    plain = replace(open_model(place).cache, calibration=None)
    save_cache(plain, place / "plain.safetensors")
    given = [f"classifier={place / 'plain.safetensors'}"]
    with pytest.raises(ValueError, match="chosen without any"):
        cafo_predict.plan(settings(place, *given, "run.name=a", "coverage=0.9"))
    result = cafo_predict.run(settings(place, *given, "run.name=plain", f"data.path={place}/photos/[01].png"))
    assert "not calibrated" in result["notices"]
    for more in ("top=2", "format=csv", "images_per_shard=3"):
        with pytest.raises(ValueError, match="holds results of other settings"):
            cafo_predict.run(settings(place, *given, "run.name=plain", f"data.path={place}/photos/[01].png", more))
    write_tar(tmp_path / "one.tar", [1, 2, 3])
    config = settings(place, "run.name=tar", f"data.path={tmp_path}")
    cafo_predict.run(config)
    write_tar(tmp_path / "one.tar", [1, 4, 3])
    with pytest.raises(ValueError, match=r"one\.tar: the file is another than when its predictions began"):
        cafo_predict.run(config)
    with pytest.raises(ValueError, match=r"none of 1 images can be read: .*broken\.png: cannot be decoded"):
        cafo_predict.run(settings(place, "run.name=broken", f"data.path={place}/photos/broken.png"))


def test_the_encoders_of_sources_that_are_left_out_are_not_needed(place: Path, local: list[int]) -> None:
    model = open_model(place)
    model.cache = replace(model.cache, ensemble=Ensemble(baseline=NOTHING, sources=("dino",)))
    model.save(place / "dino.safetensors")
    config = settings(place, f"classifier={place / 'dino.safetensors'}", "run.name=dino")
    config = replace(config, encoders={"dino": config.encoders["dino"]})
    cafo_predict.run(config)
    rows = rows_of(config.run.folder)
    assert {row["path"] for row in rows} == READABLE
    check(rows, model)


def test_a_rival_that_a_sweep_has_saved_predicts_too(place: Path, local: list[int]) -> None:
    clip = open_model(place).encoders["clip"]
    images = torch.stack([clip.preprocess(load_image(png(100 + number))) for number in range(M)])
    features, labels = clip.encode_image(images), torch.arange(M) % len(CLASSES)
    shots = FewShotImages(
        views=Features(embeddings=features[None]),
        plain=Features(embeddings=features),
        labels=labels,
        classifier=torch.randn(features.shape[1], len(CLASSES), generator=torch.Generator().manual_seed(0)),
    )
    method = METHODS["nearest class mean"]
    chosen = fit_and_choose(method, shots, "crossfit", seed=0)
    rival = FewShotClassifier(
        name="nearest class mean",
        method=method,
        fitted=chosen.fitted,
        setting=chosen.setting,
        class_names=tuple(CLASSES),
        source="clip",
        encoders={"clip": clip.identity},
    )
    save_classifier(rival, place / "rival.safetensors")
    config = settings(place, f"classifier={place / 'rival.safetensors'}", "run.name=rival")
    assert "not calibrated" in cafo_predict.run(config)["notices"]
    for row in rows_of(config.run.folder):
        image = clip.preprocess(load_image(CONTENTS[row["path"]]()))
        p = rival.logits({"clip": clip.encode_image(image[None])}).softmax(dim=-1)[0]
        assert row["probability_1"] == pytest.approx(float(p.max()), abs=1e-3)
        assert p[list(CLASSES).index(row["class_1"])] == pytest.approx(float(p.max()), abs=1e-3)


def test_the_plan_says_what_is_left(place: Path, local: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(place, "run.name=planned", "coverage=0.8")
    cafo_predict.plan(config)
    told = " ".join(capsys.readouterr().out.split())
    assert "8 images, 3 rows of Parquet files, 1 tars" in told
    assert "calibrated on 30 held-out images" in told
    assert not config.run.folder.exists()
    cafo_predict.run(config)
    capsys.readouterr()
    cafo_predict.plan(config)
    assert "0 of 14 images, in 0 tasks" in " ".join(capsys.readouterr().out.split())


def test_the_best_classifier_of_a_sweep_is_taken(place: Path, tmp_path: Path) -> None:
    cache = open_model(place).cache
    setting = Setting(0, 1, ("clip",), "clip only", "templates", 1e-3, 1, 1.0, 1.0)
    chosen = []
    for method, shots, accuracies in (("a", 1, (0.5, 0.4)), ("b", 1, (0.3, 0.2)), ("a", 16, (0.7, 0.8))):
        trials = []
        for seed, accuracy in enumerate(accuracies, 1):
            name = f"{method}-{shots}-{seed}"
            (tmp_path / "trials" / name).mkdir(parents=True)
            save_cache(replace(cache, alpha=100 * shots + seed), tmp_path / "trials" / name / "cache.safetensors")
            trials.append(ChosenTrial(seed=seed, trial=name, accuracy=accuracy, alpha=1, beta=1, ensemble="{}"))
        rest = {"group": {}, "setting": setting, "select": "val", "finished": 1, "stopped": 0}
        mean = sum(accuracies) / 2
        chosen.append(ChosenSetting(method=method, shots=shots, accuracy=mean, seeds=tuple(trials), **rest))

    def alpha(**how: Any) -> float:
        return open_chosen(tmp_path, chosen, **{"method": None, "shots": None, "seed": None, **how}).classifier.alpha

    assert (alpha(), alpha(seed=1), alpha(shots=1), alpha(method="b")) == (1602, 1601, 101, 101)
    for how, match in (({"shots": 4}, "it has 'a' at 1 shots"), ({"seed": 9}, "has seeds 1, 2")):
        with pytest.raises(ValueError, match=match):
            alpha(**how)


@pytest.mark.ray
def test_the_command_predicts_on_a_cluster(place: Path, busy_cluster: None) -> None:
    specs = json.loads((place / "encoders.json").read_text())
    write_json(place / "config.yaml", {"encoders": specs, "top": 3, "images_per_shard": 4})
    command = ["cafo-predict", "--config", str(place / "config.yaml"), f"classifier={place / 'model.safetensors'}"]
    command += [f"data.path={place / 'photos'}", f"run.storage={place / 'runs'}", "run.name=cluster"]
    command += ["scale.gpus_per_worker=0"]
    assert main(command) == 0
    folder = place / "runs" / "cluster"
    rows = rows_of(folder)
    assert sorted(row["path"] for row in rows) == sorted(READABLE)
    check(rows, open_model(place))
    result = read_json(folder / "result.json")
    assert result["predicted_now"] == 14
    assert "12 images predicted, 2 rejected" in result["headline"]
    assert (folder / "report.html").is_file()
