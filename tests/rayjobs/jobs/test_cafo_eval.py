"""cafo-eval and the chain: test opened once, for the choice that val made; tables that the run folder proves."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from cafo import fewshot, paper_results
from cafo.cache import load_cache
from cafo.methods.saved import load_classifier
from rayjobs.config import load
from rayjobs.jobs import cafo, cafo_eval, cafo_tune
from rayjobs.models.encoder import VisionEncoderConfig
from rayjobs.reporting.accuracy_tables import accuracy_table, published_rows
from rayjobs.runs.record import read_record
from rayjobs.storage.files import read_json, write_json
from rayjobs.tune.search_space import Setting
from rayjobs.tune.selection import ChosenSetting, settings_to_plot
from tests.cafo.server import serve
from tests.rayjobs.cafo_dataset import CLASSES, make_dataset, make_images
from tests.rayjobs.direct_prolip import PROLIP, check_prolip
from tests.rayjobs.pages import page_text

FEW = ["space.shots=[1,3]", "space.seeds=[0,1]", "space.generated=[2]", "space.epochs=[2]", "search.beta_steps=20"]


def test_the_table_has_the_papers_shape() -> None:
    cells = [("CLIP zero-shot", None, 0.5), *(("CaFo", k, a) for k, a in ((0, 0.55), (0, 0.55), (1, 0.6), (1, 0.62)))]
    rows = [
        {"method": method, "shots": k, "accuracy": accuracy, "images": 1000}
        for method, k, accuracy in (*cells, ("CaFo", 16, 0.7))
    ]
    columns, lines = accuracy_table(rows, {"CaFo, published": {1: 91.85, 2: 92.37}, "of no use": {8: 93.83}})
    assert columns == ["method", "0 shots", "1 shot", "16 shots"]
    assert lines == [
        ["CLIP zero-shot", *["50.0 [46.9, 53.1]"] * 3],
        ["CaFo", "55.0 [51.9, 58.1]", "61.0 ± 1.4 [57.9, 64.0]", "70.0 [67.1, 72.8]"],  # without shots nothing varies
        ["CaFo, published", "", "91.85", ""],
    ]


def test_published_figures_stand_beside_the_same_data_and_encoders_only() -> None:
    clip = VisionEncoderConfig(kind="clip", name="RN50-quickgelu", weights="openai")
    dino = VisionEncoderConfig(kind="dino", weights="dino_resnet50_pretrain.pth")
    pair = {"clip": clip, "dino": dino}
    dtd = dict(zip(paper_results.SHOTS, paper_results.RN50["dtd"], strict=True))
    assert published_rows("dtd", "dtd", pair, []) == {"CaFo, published": dtd}
    vit = VisionEncoderConfig(kind="clip", name="ViT-B-16", weights="openai")
    assert published_rows("imagenet", "imagenet", {"clip": vit, "dino": dino}, []) == {"CaFo, published": {16: 74.48}}
    for data_set, target, encoders in (
        ("dtd", "dtd", {"clip": vit, "dino": dino}),
        ("dtd", "dtd", {"clip": clip}),
        ("dtd", "imagenet_v2", pair),
        ("my own", "my own", pair),
        ("imagenet", "imagenet_v2", {"clip": vit, "dino": dino}),
    ):
        assert published_rows(data_set, target, encoders, []) == {}
    assert published_rows("imagenet", "imagenet_v2", pair, []) == {"CaFo, published": {16: 57.99}}


def test_every_clip_of_a_sweep_over_encoders_has_its_own_row() -> None:
    names = {"RN50": "RN50-quickgelu", "ViT": "ViT-B-16"}
    encoders = {name: VisionEncoderConfig(kind="clip", name=known, weights="openai") for name, known in names.items()}
    encoders["dino"] = VisionEncoderConfig(kind="dino", weights="dino_resnet50_pretrain.pth")
    settings = [{"encoders": [name, "dino"]} for name in names]
    rows = published_rows("imagenet", "imagenet", encoders, settings)
    assert {name: row[16] for name, row in rows.items()} == {
        "RN50 + dino, published": 68.79,
        "ViT + dino, published": 74.48,
    }


def test_the_cascades_rows_stand_beside_the_settings_that_are_theirs() -> None:
    clip = VisionEncoderConfig(kind="clip", name="RN50", weights="openai")
    dino = VisionEncoderConfig(kind="dino", weights="dino_resnet50_pretrain.pth")
    given = [
        ("clip only", 0, "templates"),
        ("dino alone", 0, "templates"),
        ("dino only", 0, "templates"),  # the paper has no such row
        ("dino alone", 8, "templates"),
        ("average", 0, "templates"),
        ("baseline clip", 8, "file"),
        ("baseline zero-shot", 0, "templates"),
        ("baseline zero-shot", 8, "templates"),
        ("baseline zero-shot", 0, "file"),
        ("baseline zero-shot", 8, "file"),
    ]
    settings = [{"encoders": ["clip", "dino"], "ensemble": e, "generated": g, "sentences": s} for e, g, s in given]
    rows = published_rows("imagenet", "imagenet", {"clip": clip, "dino": dino}, settings)
    assert {name.removesuffix(", published"): row[16] for name, row in rows.items()} == {
        "CLIP cache": 65.51,
        "DINO cache": 53.27,
        "CLIP + DINO": 68.08,
        "CLIP + DINO + DALL-E": 68.42,
        "CLIP + DINO + GPT-3": 68.51,
        "CaFo": 68.79,
    }
    assert rows["CaFo, published"][0] == 62.99


def test_a_sweep_that_has_not_chosen_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run of cafo-tune"):
        cafo_eval.run(cafo_eval.Config(sweep=str(tmp_path)))
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(ValueError, match="has not chosen yet"):
        cafo_eval.run(cafo_eval.Config(sweep=str(tmp_path)))


def chain(folder: Path, *more: str) -> cafo.Config:
    """All steps: sentences asked for, images taken from a folder, a sweep with rivals, and a second test set."""
    given = [one for one in make_dataset(folder) if not one.startswith(("data.prompts", "data.generated"))]
    shifted = make_images(folder / "shifted", {"train": 1, "val": 1, "test": 4}, seed=5)
    steps = ["prompt.source=endpoint", "prompt.endpoint.model=gpt", "prompt.endpoint.key_variable="]
    steps += ["prompt.endpoint.requests_per_minute=60000", "prompt.answers=2", "prompt.commands=['Describe a {}.']"]
    steps += ["generate.source=folder", f"generate.folder={folder / 'generated' / 'train'}"]
    steps += ["generate.candidates=3", "generate.keep=2", f"targets.shift.split={shifted}"]
    steps += [f"space.rivals={{GDA: {{}}, TIMO: {{}}, ProLIP: {json.dumps(PROLIP)}}}"]
    return load(cafo.Config, None, [*given, *FEW, *steps, "data.name=colours", "run.name=chain", *more])


def test_the_chain_tells_what_cannot_work_before_it_asks_or_draws(tmp_path: Path) -> None:
    for more, match in (
        (["data.prompts=p.json"], "data.prompts already names"),
        (["data.generated=dalle"], "data.generated already names"),
        (["space.ensemble=[median]"], "median unknown"),
        (["reference=GDB"], "reference: there is no row called 'GDB'; there are CaFo, GDA, TIMO, ProLIP"),
    ):
        with pytest.raises(ValueError, match=match):
            cafo.run(chain(tmp_path / match[:6], *more))
        assert not (tmp_path / match[:6] / "runs").exists()


def test_the_best_choice_is_plotted_first_then_each_methods_at_its_most_shots() -> None:
    cells = [("a", 1, 0.9), ("b", 1, 0.1), ("a", 16, 0.8), ("c", 16, 0.2), ("b", 4, 0.3)]
    setting = Setting(0, 1, ("clip",), "clip only", "templates", 1e-3, 1, 1.0, 1.0)
    rest = {"group": {}, "setting": setting, "finished": 1, "stopped": 0, "seeds": ()}
    chosen = [ChosenSetting(method=m, shots=k, accuracy=v, select="val", **rest) for m, k, v in cells]
    assert [(choice.method, choice.shots) for choice in settings_to_plot(chosen)] == [("a", 1), ("c", 16), ("b", 4)]


@pytest.mark.ray
def test_the_chain_opens_test_once_for_its_choice(
    tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with serve() as (url, requests):
        config = chain(tmp_path, f"prompt.endpoint.base_url={url}", f"run.track.mlflow=file:{tmp_path}/mlflow")
        result = cafo.run(config)["eval"]
        assert len(requests) == 4 * 2
        kept = {path: path.stat().st_mtime_ns for path in config.run.folder.glob("*/*/*.safetensors")}
        cafo.run(config)  # as a whole again: nothing is asked, drawn, encoded or trained twice
        assert len(requests) == 4 * 2
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
    cache = load_cache(next(path for path in kept if path.name == "cache.safetensors"))
    assert len(cache.labels) in (4 * (1 + 2), 4 * (3 + 2))
    assert result["test_images"] == {"colours": 28, "shift": 16}
    test = config.run.folder / "test"
    rows = pq.read_table(test / "accuracy.parquet").to_pylist()
    assert len(rows) == 2 * (1 + 2 * 2 * 4)
    check_rivals(config, rows, result)
    assert len(list(test.glob("landscape-*.png"))) == len(list(test.glob("sources-*.png"))) == 1
    sources = pq.read_table(test / "sources.parquet").to_pylist()
    assert sum(row["images"] for row in sources) == sum(row["images"] for row in rows if row["method"] == "CaFo")
    for name in ("per_class", "confusion"):
        whole = pq.read_table(test / f"{name}.parquet").to_pylist()
        assert sum(row["images"] for row in whole) == sum(row["images"] for row in rows)
    assert "| method | 1 shot | 3 shots |" in (test / "table.md").read_text()
    suffixes = {path.suffix for path in test.iterdir() if path.is_file()}
    assert suffixes == {".json", ".jsonl", ".parquet", ".md", ".csv", ".png", ".svg"}
    assert (test.parent / "report.html").read_text().count("<svg") == len(list(test.glob("*.svg")))

    record = read_record(config.run.folder)
    assert (record.job, record.state) == ("cafo", "done")
    assert load(cafo.Config, config.run.folder / "config.yaml") == config, "of what was typed, not of its parts"
    (description, *_) = read_json(config.run.folder / "prompt" / "prompts.json")["red_thing"]
    assert " ".join(description.split()) in page_text(config.run.folder / "prompt")
    assert (config.run.folder / "generate" / "report.html").read_text().count("<img") == 4 * 2
    client = mlflow.MlflowClient(tracking_uri=config.run.track.mlflow)
    (tracked,) = client.search_runs([client.get_experiment_by_name("rayjobs").experiment_id])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.metrics["result/eval/test_accuracy"] == result["test_accuracy"]
    assert tracked.data.metrics["result/tune/val_accuracy"] > 0

    evaluation = cafo_eval.Config(sweep=str(config.run.folder), plots=False)
    assert cafo_eval.check(evaluation).run == config.run
    opened = read_json(test / "opened.json")
    accuracies = [row["accuracy"] for row in rows if row["target"] == "colours"]
    cafo_eval.run(evaluation)  # the same choice, the same answer
    again = pq.read_table(test / "accuracy.parquet").to_pylist()
    assert [row["accuracy"] for row in again] == accuracies
    assert read_json(test / "opened.json") == opened
    other = tmp_path / "encoders" / "dino.pth"
    weights = torch.load(other)
    torch.save({"teacher": {name: 1.5 * tensor for name, tensor in weights["teacher"].items()}}, other)
    with pytest.raises(ValueError, match=r"encoders.dino: the sweep's caches are of .*, the weights are now"):
        cafo_eval.run(evaluation)
    with pytest.raises(ValueError, match=r"holds trials of other inputs \(encoders.dino: was .*, now"):
        cafo_tune.run(cafo.tune_settings(config))
    chosen = read_json(config.run.folder / "chosen.json")
    chosen["chosen"][0]["seeds"].pop()
    write_json(config.run.folder / "chosen.json", chosen)
    with pytest.raises(ValueError, match=r"opened on .* for another choice"):
        cafo_eval.run(evaluation)


def check_rivals(config: cafo.Config, rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """Rivals are scored on the same images, from their own files, and compared with CaFo seed by seed."""
    folder = config.run.folder
    saved = [load_classifier(path) for path in sorted(folder.glob("trials/*/method.safetensors"))]
    assert sorted({one.name for one in saved}) == ["GDA", "ProLIP", "TIMO"]
    dataset = config.data.open()
    for one in saved:
        known = {(item.path, item.class_name) for item in dataset.train}
        assert {(image.path, image.class_name) for image in one.images} <= known
        assert len(one.images) in (4 * 1, 4 * 3)
        assert one.class_names == dataset.class_names
    check_prolip(config, [one for one in saved if one.name == "ProLIP"])
    for title, lines in result["differences"].items():
        target = title.partition(":")[0]
        assert title == f"{target}: difference from CaFo, in points with 95% intervals"
        assert list(lines) == ["CLIP zero-shot", "GDA", "TIMO", "ProLIP"]
        accuracy = {
            (row["method"], row["seed"]): row["accuracy"]
            for row in rows
            if (row["target"], row["shots"]) == (target, 3)
        }
        mean = sum(100 * (accuracy["GDA", seed] - accuracy["CaFo", seed]) for seed in (0, 1)) / 2
        assert float(lines["GDA"]["3 shots"].split()[0]) == pytest.approx(mean, abs=0.5)
    report = (folder / "report.html").read_text()
    assert "colours: difference from CaFo, in points with 95% intervals" in report
    assert "difference from CaFo" in (folder / "test" / "table.md").read_text()


def make_tree(folder: Path) -> list[str]:
    """The images of `make_dataset` as a tree of splits and class folders; return the overrides that name it."""
    given = [one for one in make_dataset(folder) if not one.startswith(("data.", "encoders.dino"))]
    (folder / "images").rename(folder / "tree")
    few = ["space.shots=[2]", "space.seeds=[0]", "space.epochs=[1]", "search.beta_steps=20"]
    return [*given, *few, f"data.tree={folder / 'tree'}", "features.max_rejected_fraction=0.5"]


@pytest.mark.ray
def test_classes_are_known_by_name_and_images_by_content_at_every_restart(
    tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, tree = make_tree(tmp_path), tmp_path / "tree"

    def sweep(name: str) -> cafo_tune.Config:
        return load(cafo_tune.Config, None, [*given, f"run.name={name}"])

    def stop(folder: Path, inputs: object) -> None:
        raise KeyboardInterrupt

    config = sweep("resumed")
    with monkeypatch.context() as patch:
        patch.setattr(cafo_tune, "check_same_inputs", stop)  # when all images are encoded
        with pytest.raises(KeyboardInterrupt):
            cafo_tune.run(config)
    for seed, name in enumerate(("ash", "zinc")):  # before and behind the others
        make_images(tmp_path / name, {"train": 18}, seed=7 + seed)
        (tmp_path / name / "train" / "grey").rename(tree / "train" / name)
    data = config.data.open()
    bad = fewshot.choose(data.train, data.class_names, shots=2, seed=0).items[3].path
    (tree / bad).write_bytes((tree / bad).read_bytes()[:60])

    def found(name: str) -> list[dict[str, Any]]:
        cafo_tune.run(sweep(name))
        rows = pq.read_table(config.run.folder.parent / name / "results.parquet").to_pylist()
        return [row | {"seconds": 0} for row in rows]

    assert found("resumed") == found("fresh")
    few = read_json(config.run.folder / "few_shot" / "shots2-seed0.json")["items"]
    assert len(few) == 2 * 6
    assert bad not in [path for path, _, _ in few]
    (trial,) = (config.run.folder / "trials").glob("*/cache.safetensors")
    cache = load_cache(trial)
    assert cache.class_names == tuple(sorted([*CLASSES, "ash", "zinc"]))
    assert torch.bincount(cache.labels).tolist() == [2] * 6

    stamp = trial.stat().st_mtime_ns
    (tree / bad).unlink()  # what could not be read is no loss
    cafo_tune.run(config)
    assert trial.stat().st_mtime_ns == stamp

    evaluation = cafo_eval.Config(sweep=str(config.run.folder), plots=False)
    splits = [tree / split for split in ("train", "val", "test")]
    for moves, message in (
        ([(split / "grey", split / "greyish") for split in splits], "renamed: 'grey' is now 'greyish'"),
        ([(tree / "train" / "ash", tmp_path / "gone")], "removed: 'ash'"),
    ):
        for old, new in moves:
            old.rename(new)
        with pytest.raises(ValueError, match=rf"the sweep's caches are of other classes .*{message}"):
            cafo_eval.run(evaluation)
        with pytest.raises(ValueError, match=rf"holds trials of other inputs \(classes {message}"):
            cafo_tune.run(config)
        for old, new in moves:
            new.rename(old)
    assert not (config.run.folder / "test" / "opened.json").exists()
    path, _, class_name = next(item for item in few if item[2] == "grey")
    leaked = next(item.path for item in data.open_test() if item.class_name == class_name)
    (tree / leaked).write_bytes((tree / path).read_bytes())
    assert (
        f"1 pairs of images are in train and in tree's test by content: {path} = {leaked}"
        in (cafo_eval.run(evaluation)["notices"])
    )


@pytest.mark.ray
def test_a_folder_of_few_images_gives_a_classifier_and_an_estimate_in_one_command(
    tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every label trains, nothing is opened as test, and the same command finds the same."""
    given = [one for one in make_dataset(tmp_path) if not one.startswith("data.")]
    for image in sorted((tmp_path / "images" / "train").glob("*/*.png")):
        target = tmp_path / "tree" / image.parent.name / image.name
        target.parent.mkdir(parents=True, exist_ok=True)
        image.rename(target)
    few = ["space.shots=[1, 6]", "space.seeds=[0]", "space.epochs=[2]", "search.beta_steps=20", "search.folds=3"]
    config = load(cafo.Config, None, [*given, *few, f"data.tree={tmp_path / 'tree'}", "run.name=few"])
    results = cafo.run(config)
    assert list(results) == ["tune"]
    tune = results["tune"]
    folder = config.run.folder
    assert not (folder / "test").exists()
    by_shots = {row["shots"]: row for row in pq.read_table(folder / "results.parquet").to_pylist()}
    assert [by_shots[shots]["select"] for shots in (1, 6)] == ["prior", "crossfit"]
    assert (by_shots[1]["accuracy"], by_shots[6]["images"], by_shots[6]["estimate_images"]) == (None, 24, 24)
    assert len(by_shots[6]["curve"]) == 3
    assert len(load_cache(folder / "trials" / by_shots[6]["trial"] / "cache.safetensors").labels) == 24
    assert tune["headline"].startswith("estimated accuracy ")
    assert tune["estimate_low"] <= tune["estimated_accuracy"] <= tune["estimate_high"]
    (estimate,) = tune["estimated accuracy on new images, %"]
    assert estimate["held-out images"] == "24"
    assert read_json(folder / "chosen.json")["chosen_on"] == "prior at K=1; crossfit at K=6"
    report = (folder / "report.html").read_text()
    assert "estimated accuracy" in report
    assert "95% interval" in report
    assert "helps" in report or "hurts" in report or "adds nothing" in report
    assert cafo.run(config)["tune"]["headline"] == tune["headline"]
