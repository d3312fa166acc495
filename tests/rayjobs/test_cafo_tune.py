"""cafo-tune: trials equal a plain use of the library, share their features, resume, and choose on val only."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cafo.cache import load_cache, mean_key
from rayjobs.choice import choose
from rayjobs.config import load
from rayjobs.jobs import cafo_tune
from rayjobs.space import Range, SearchConfig, SpaceConfig, settings_of, trials_of
from rayjobs.sweep import Rows, shared_tensor
from rayjobs.tables import read_json
from tests.rayjobs.cafo_world import world


def sweep(given: list[str], *more: str, name: str = "sweep") -> cafo_tune.Config:
    few = [
        "space.shots=[1,3]",
        "space.seeds=[0,1]",
        "space.generated=[0,2]",
        "space.epochs=[3]",
        "search.beta_steps=20",
    ]
    return load(cafo_tune.Config, None, [*given, *few, f"run.name={name}", *more])


def test_settings_of_a_space() -> None:
    space = SpaceConfig(ensemble=["baseline zero-shot", "dino only"], encoders=[["clip"], ["clip", "dino"]], lr=[1, 2])
    grid = settings_of(space, SearchConfig(), ["clip", "dino"], 4, file=False)
    assert len(grid) == 6  # `dino only` has no meaning without dino
    assert len(trials_of(space, grid)) == 6 * 5 * 3
    drawn = SearchConfig(method="random", samples=5, compare=["ensemble"])
    ranged = SpaceConfig(ensemble=["average", "maximum"], lr=Range(low=1e-4, high=1e-2))
    points = settings_of(ranged, drawn, ["clip", "dino"], 4, file=True)
    assert points == settings_of(ranged, drawn, ["clip", "dino"], 4, file=True)
    assert len(points) == 10
    assert all(1e-4 <= point.lr <= 1e-2 and point.sentences == "file" for point in points)
    for wrong, match in (
        (SpaceConfig(ensemble=["median"]), "median unknown"),
        (SpaceConfig(encoders=[["vit"]]), "vit not among"),
        (SpaceConfig(views=[9]), "not from 1 to"),
        (ranged, "a range can be drawn"),
    ):
        with pytest.raises(ValueError, match=match):
            settings_of(wrong, SearchConfig(), ["clip", "dino"], 4, file=False)


def test_shared_rows_behave_as_the_tensor_they_stand_for() -> None:
    features = np.random.default_rng(0).normal(size=(5, 301, 7)).astype(np.float32)
    features.setflags(write=False)
    rows = torch.randperm(301)[:283]
    shared = shared_tensor(features)
    assert shared.data_ptr() == features.ctypes.data
    stand_in, real = Rows(shared, 3, rows), torch.tensor(features)[:3, rows]
    assert stand_in.shape == real.shape
    at = torch.tensor([0, 5, 282])
    assert torch.equal(stand_in[2, at], real[2, at])
    torch.testing.assert_close(stand_in.keys(), mean_key(real))


def test_the_choice_is_the_best_mean_over_seeds_and_the_earliest_on_ties() -> None:
    space = SpaceConfig(shots=[1], seeds=[1, 2], lr=[1.0, 2.0, 3.0])
    trials = trials_of(space, settings_of(space, SearchConfig(), ["clip"], 4, file=False))
    correct = [9, 1, 5, 7, 6, 6]
    rows = [
        {"trial": t.name, "seed": t.seed, "val_correct": c, "val_accuracy": c / 10}
        | {"chosen_alpha": 1, "chosen_beta": 1, "chosen_ensemble": "{}"}
        for t, c in zip(trials, correct, strict=True)
    ]
    (chosen,) = choose(trials, rows, [])
    assert (chosen["setting"]["lr"], chosen["val_accuracy"]) == (2.0, 0.6)
    assert [cell["method"] for cell in choose(trials, rows, ["lr"])] == ["lr 1.0", "lr 2.0", "lr 3.0"]


@pytest.mark.ray
def test_a_sweep_resumes_and_is_the_same_without_test_images(tmp_path: Path, cluster: None) -> None:
    given = world(tmp_path)
    config = sweep(given, "search.compare=[generated]", "search.temperatures=[1, 4]")
    result = cafo_tune.run(config)
    assert result["trials"] == 8
    folder = config.run.folder
    table = pq.read_table(folder / "results.parquet").to_pylist()
    assert len(table) == 8
    chosen = read_json(folder / "chosen.json")["chosen"]
    assert [(c["shots"], c["method"]) for c in chosen] == [
        (shots, f"generated {keep}") for shots in (1, 3) for keep in (0, 2)
    ]
    dataset = config.data.open()
    for cell in chosen:
        for seed in cell["seeds"]:
            cache = load_cache(folder / "trials" / seed["trial"] / "cache.safetensors")
            assert (cache.alpha, cache.beta) == (seed["alpha"], seed["beta"])
            assert len(cache.labels) == 4 * (cell["shots"] + cell["setting"]["generated"])
    few = read_json(folder / "few_shot" / "shots3-seed1.json")["items"]
    assert {tuple(item) for item in few} < set(dataset.train)

    # some trials lost, test images gone: the lost ones alone are run again, to the same end
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/result.json")}
    lost = sorted(stamps)[:3]
    for path in lost:
        shutil.rmtree(path.parent)
    shutil.rmtree(tmp_path / "images" / "test")
    before = (folder / "chosen.json").read_text()
    cafo_tune.run(config)
    assert (folder / "chosen.json").read_text() == before
    again = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/result.json")}
    assert sorted(path for path in stamps if again[path] != stamps[path]) == lost

    with pytest.raises(ValueError, match="holds a sweep with other space"):
        cafo_tune.run(sweep(given, "space.epochs=[5]", "search.compare=[generated]", "search.temperatures=[1, 4]"))
    assert json.loads(before)["chosen_on"] == "val"
