"""cafo-inspect: exact explanations of a sweep's cache, wrong labels, near-duplicates; no label of test is used."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rayjobs.config import load
from rayjobs.jobs import cafo_inspect, cafo_tune
from rayjobs.runs.record import read_record
from rayjobs.storage.files import read_json
from rayjobs.tune.inspected import pick_choice
from rayjobs.tune.search_space import Setting
from rayjobs.tune.selection import ChosenSetting, ChosenTrial
from tests.rayjobs.cafo_dataset import make_dataset


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def choice(method: str, shots: int, accuracy: float, rival: str = "") -> ChosenSetting:
    setting = Setting(0, 1, ("clip",), "clip only", "templates", 1e-3, 1, 1.0, 1.0, rival=rival)
    seeds = tuple(
        ChosenTrial(seed=seed, trial=f"{method}-{shots}-{seed}", accuracy=accuracy, alpha=1.0, beta=1.0, ensemble="{}")
        for seed in (1, 2)
    )
    rest: dict[str, Any] = {"group": {}, "select": "val", "finished": 1, "stopped": 0}
    return ChosenSetting(method=method, shots=shots, setting=setting, accuracy=accuracy, seeds=seeds, **rest)


def test_the_best_cache_is_inspected_unless_another_is_named() -> None:
    chosen = [choice("CaFo", 1, 0.5), choice("CaFo", 4, 0.8), choice("APE", 4, 0.9, rival="APE")]
    assert pick_choice(chosen, shots=None, method=None, seed=None)[1] == "CaFo-4-1"
    assert pick_choice(chosen, shots=1, method="CaFo", seed=2)[1] == "CaFo-1-2"
    with pytest.raises(ValueError, match=r"at shots=8.*; it has chosen CaFo at 1 shots, seeds 1, 2; CaFo at 4 shots"):
        pick_choice(chosen, shots=8, method=None, seed=None)
    with pytest.raises(ValueError, match="rivals alone, which have no keys"):
        pick_choice(chosen[2:], shots=None, method=None, seed=None)


@pytest.mark.ray
def test_a_sweep_is_inspected(tmp_path: Path, cluster: None) -> None:
    given = make_dataset(tmp_path)
    images = tmp_path / "images"
    split = json.loads((images / "split.json").read_text())
    copied, original = split["train"][0][0], split["test"][9][0]
    Image.open(images / original).resize((82, 74)).save(images / copied)  # a near-duplicate between train and test
    few = ["space.shots=[6]", "space.seeds=[0]", "space.generated=[2]", "space.epochs=[1]", "search.beta_steps=20"]
    sweep = load(cafo_tune.Config, None, [*given, *few, "run.name=colours"])
    folder = sweep.run.folder
    with pytest.raises(ValueError, match="no run of cafo-tune"):
        cafo_inspect.run(cafo_inspect.Config(sweep=str(folder)))
    cafo_tune.run(sweep)
    shutil.copytree(images / "test" / "grey", tmp_path / "pool" / "deeper")

    more = [
        f"sweep={folder}",
        f"unlabelled={tmp_path / 'pool'}",
        "next_labels=3",
        "test=true",
        "duplicate_cosine=0.999",
    ]
    settings = load(cafo_inspect.Config, None, more)
    cafo_inspect.plan(settings)
    result = cafo_inspect.run(settings)
    out = folder / "inspect"
    own, before = read_record(out), read_record(folder)
    assert own is not None
    assert before is not None
    assert (own.job, own.state) == ("cafo-inspect", "done")
    assert before.job == "cafo-tune", "the sweep's own record stays"

    by_image: dict[str, dict[str, float]] = {}
    for row in read_csv(out / "contributions.csv"):
        parts = by_image.setdefault(
            row["image"], {"margin": float(row["margin"]), "sum": 0.0, "text": 0.0, "said": 0.0}
        )
        parts["said" if row["kind"] == "sentence" else "sum"] += float(row["pull"])
        parts["text"] += float(row["pull"]) * (row["kind"] == "text")
    assert by_image
    for parts in by_image.values():
        assert parts["sum"] == pytest.approx(parts["margin"], abs=2e-3)
        assert parts["said"] == pytest.approx(parts["text"], abs=2e-3)
    wrong = read_csv(out / "label_errors.csv")
    assert [float(row["margin"]) for row in wrong] == sorted(float(row["margin"]) for row in wrong)
    assert all(row["label"] != row["suggested"] and float(row["margin"]) < 0 for row in wrong)
    assert {row["split"] for row in wrong} <= {"train", "val"}
    pairs = read_csv(out / "near_duplicates.csv")
    (pair,) = [row for row in pairs if {row["first"], row["second"]} == {copied, original}]
    assert (pair["first_split"], pair["second_split"], pair["second_class"]) == ("train", "test", "")
    assert "28 test images were compared by their features; no label of them was used" in result["notices"]
    assert len(read_csv(out / "next_labels.csv")) == 3
    confused = read_csv(out / "confusions.csv")
    assert len(confused) == result["confused_pairs"]
    for row in confused:
        pulls = [float(row[name]) for name in ("text", "clip", "dino") if row.get(name)]
        assert sum(pulls) == pytest.approx(float(row["margin"]), abs=5e-3)

    page = (out / "report.html").read_text()
    for title in ("labels that may be wrong", "near-duplicates", "confused classes", "why ", "worth labelling next"):
        assert title in page
    assert page.count("<img") == sum(len(s["images"]) for s in read_json(out / "pictures.json"))
    assert page.count('alt="') == page.count("<img")

    again = cafo_inspect.run(cafo_inspect.Config(sweep=str(folder), images=str(images / original)))
    assert "next_labels" not in again
    assert {row["image"] for row in read_csv(out / "contributions.csv")} == {Path(original).name}
    assert "test" not in {row["second_split"] for row in read_csv(out / "near_duplicates.csv")}
