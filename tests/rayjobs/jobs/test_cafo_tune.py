"""cafo-tune: trials equal a plain use of the library, share their features, resume, and choose on val only."""

import json
import shutil
from pathlib import Path

import numpy as np
import optuna
import pyarrow.parquet as pq
import pytest
import ray
import torch

from cafo.cache import load_cache, mean_key
from rayjobs.config import load
from rayjobs.errors import ProvenanceError
from rayjobs.jobs import cafo, cafo_tune
from rayjobs.storage.files import read_json
from rayjobs.tune.optuna_study import suggest_setting
from rayjobs.tune.search_space import Range, SearchConfig, SpaceConfig, enumerate_settings, enumerate_trials
from rayjobs.tune.selection import ChosenSetting, choose_settings
from rayjobs.tune.trial import SharedInputs, SharedRows, TrialResult, run_trial, shared_tensor
from tests.rayjobs.cafo_dataset import make_dataset


def sweep(given: list[str], *more: str, name: str = "sweep") -> cafo_tune.Config:
    few = [
        "space.shots=[1,3]",
        "space.seeds=[0,1]",
        "space.generated=[0,2]",
        "space.epochs=[3]",
        "search.beta_steps=20",
    ]
    return load(cafo_tune.Config, None, [*given, *few, f"run.name={name}", *more])


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A world whose features are made once: K = 1 is part of K = 3."""
    return make_dataset(tmp_path_factory.mktemp("world"))


def test_settings_of_a_space() -> None:
    space = SpaceConfig(ensemble=["baseline zero-shot", "dino only"], encoders=[["clip"], ["clip", "dino"]], lr=[1, 2])
    grid = enumerate_settings(space, SearchConfig(), ["clip", "dino"], 4, file=False)
    assert len(grid) == 6  # `dino only` has no meaning without dino
    assert len(enumerate_trials(space, grid)) == 6 * 5 * 3
    drawn = SearchConfig(method="random", samples=5, compare=["ensemble"])
    ranged = SpaceConfig(ensemble=["average", "maximum"], lr=Range(low=1e-4, high=1e-2))
    points = enumerate_settings(ranged, drawn, ["clip", "dino"], 4, file=True)
    assert points == enumerate_settings(ranged, drawn, ["clip", "dino"], 4, file=True)
    assert len(points) == 10
    assert all(1e-4 <= point.lr <= 1e-2 and point.sentences == "file" for point in points)
    for wrong, match in (
        (SpaceConfig(ensemble=["median"]), "median unknown"),
        (SpaceConfig(encoders=[["vit"]]), "vit not among"),
        (SpaceConfig(views=[9]), "not from 1 to"),
        (ranged, "a range needs search.method"),
    ):
        with pytest.raises(ValueError, match=match):
            enumerate_settings(wrong, SearchConfig(), ["clip", "dino"], 4, file=False)


def test_methods_narrow_the_space_by_name() -> None:
    space = SpaceConfig(
        generated=[0, 2],
        lr=[1e-3, 1e-2],
        methods={
            "CLIP cache": {"encoders": [["clip"]], "generated": [0]},
            "DINO cache": {"encoders": [["clip", "dino"]], "generated": [0], "ensemble": ["dino alone"]},
            "all": {},
        },
    )
    points = enumerate_settings(space, SearchConfig(), ["clip", "dino"], 4, file=True)
    assert [(p.method, p.generated, len(p.encoders)) for p in points[::2]] == [
        ("CLIP cache", 0, 1),
        ("DINO cache", 0, 2),
        ("all", 0, 2),
        ("all", 2, 2),
    ]
    names = {trial.name for trial in enumerate_trials(space, points)}
    assert len(names) == 8 * 5 * 3, "equal settings of two methods are two trials"
    for wrong, match in (
        ({"generated": ["many"]}, "methods.all: generated"),
        ({"encoders": [["vit"]]}, "vit not among"),
    ):
        narrowed = SpaceConfig(methods={"all": wrong})
        with pytest.raises(ValueError, match=match):
            enumerate_settings(narrowed, SearchConfig(), ["clip", "dino"], 4, file=True)


def test_shared_rows_behave_as_the_tensor_they_stand_for() -> None:
    features = np.random.default_rng(0).normal(size=(5, 301, 7)).astype(np.float32)
    features.setflags(write=False)
    rows = torch.randperm(301)[:283]
    shared = shared_tensor(features)
    assert shared.data_ptr() == features.ctypes.data
    stand_in, real = SharedRows(shared, 3, rows), torch.tensor(features)[:3, rows]
    assert stand_in.shape == real.shape
    at = torch.tensor([0, 5, 282])
    assert torch.equal(stand_in[2, at], real[2, at])
    torch.testing.assert_close(stand_in.keys(), mean_key(real))


def test_the_choice_is_the_best_mean_over_seeds_and_the_earliest_on_ties() -> None:
    space = SpaceConfig(shots=[1], seeds=[1, 2], lr=[1.0, 2.0, 3.0])
    trials = enumerate_trials(space, enumerate_settings(space, SearchConfig(), ["clip"], 4, file=False))
    correct = [9, 1, 5, 7, 6, 6]
    found = {"chosen_alpha": 1.0, "chosen_beta": 1.0, "chosen_ensemble": "{}"}
    results = [
        (trial, TrialResult.of(trial, "finished", [0.1], correct=count, accuracy=count / 10, **found))
        for trial, count in zip(trials, correct, strict=True)
    ]
    (chosen,) = choose_settings(results, [])
    assert (chosen.setting.lr, chosen.accuracy) == (2.0, 0.6)
    assert [choice.method for choice in choose_settings(results, ["lr"])] == ["lr 1.0", "lr 2.0", "lr 3.0"]
    assert ChosenSetting.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen

    # the best was stopped at one seed, another never came to its second: neither is compared
    stopped = (trials[3], TrialResult.of(trials[3], "stopped", [0.1]))
    (chosen,) = choose_settings([*results[:3], stopped, *results[4:]], [])
    assert (chosen.setting.lr, chosen.finished, chosen.stopped) == (3.0, 2, 1)
    (chosen,) = choose_settings([*results[:2], results[4]], [])
    assert (chosen.setting.lr, chosen.finished, chosen.stopped) == (1.0, 1, 0)


def test_optuna_suggests_only_what_has_a_meaning() -> None:
    space = SpaceConfig(
        ensemble=["clip only", "dino only", "average"], encoders=[["clip"], ["clip", "dino"]], lr=Range(low=1, high=2)
    )
    every = enumerate_settings(space, SearchConfig(method="optuna"), ["clip", "dino"], 4, file=False)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = [suggest_setting(study.ask(), every, space.lr) for _ in range(60)]
    assert {(p.encoders, p.ensemble) for p in points} == {(p.encoders, p.ensemble) for p in every}
    assert all(1 <= p.lr <= 2 for p in points)


@pytest.mark.ray
def test_a_sweep_resumes_and_is_the_same_without_test_images(
    given: list[str], cluster: None, terminal: pytest.CaptureFixture[str]
) -> None:
    config = sweep(given, "search.compare=[generated]", "search.temperatures=[1, 4]")
    result = cafo_tune.run(config)
    assert result["trials"] == 8
    assert "8/8" in terminal.readouterr().err
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
            choice = read_json(folder / "few_shot" / f"shots{cell['shots']}-seed{seed['seed']}.json")["items"]
            assert cache.key_names[: len(choice)] == tuple(path for path, _, _ in choice)
            assert len(cache.key_names) == len(cache.labels)
    few = read_json(folder / "few_shot" / "shots3-seed1.json")["items"]
    assert {tuple(item) for item in few} < set(dataset.train)

    # some trials lost, test images gone: the lost ones alone are run again, to the same end
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/result.json")}
    lost = sorted(stamps)[:3]
    for path in lost:
        shutil.rmtree(path.parent)
    shutil.rmtree(dataset.image_root / "test")
    before = (folder / "chosen.json").read_text()
    cafo_tune.run(config)
    assert (folder / "chosen.json").read_text() == before
    again = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/result.json")}
    assert sorted(path for path in stamps if again[path] != stamps[path]) == lost

    with pytest.raises(ValueError, match=r"other settings \(space\.epochs"):
        cafo_tune.run(sweep(given, "space.epochs=[5]", "search.compare=[generated]", "search.temperatures=[1, 4]"))
    assert json.loads(before)["chosen_on"] == "val"


def test_a_job_submitted_again_is_the_same_sweep(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its copy of the working folder, where relative paths and defaults lead, is a new one each time."""
    roots = set()
    for package, data in (("0a1b", "data"), ("2c3d", "data"), ("2c3d", "other")):
        folder = tmp_path / "session_1" / "working_dir_files" / f"_ray_pkg_{package}"
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(folder)
        config = sweep(given, f"data.root={data}", name="again")
        roots.add(config.data.root)
        if data == "data":
            cafo_tune.check_same_sweep(config)
    assert len(roots) == 3
    with pytest.raises(ValueError, match=r"other settings \(data\.root was .*data, now .*other\)"):
        cafo_tune.check_same_sweep(config)


def test_a_dry_run_tells_that_the_folder_has_a_sweep_of_other_settings(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = f"run.storage={tmp_path}"
    cafo_tune.check_same_sweep(sweep(given, storage))
    cafo_tune.plan(sweep(given, storage, "trials.workers=2"))
    with pytest.raises(ProvenanceError, match=r"other settings \(space\.epochs\[0\] was 3, now 4\)"):
        cafo_tune.plan(sweep(given, storage, "space.epochs=[4]"))

    monkeypatch.setattr(cafo, "opens_test", lambda *_: False)  # without test images, cafo's sweep estimates
    untested = cafo.Config(**vars(sweep(given, storage, name="untested")))
    cafo_tune.check_same_sweep(cafo.with_estimate(cafo.tune_settings(untested), has_test=False))
    cafo.plan(untested)


@pytest.mark.ray
def test_halving_stops_the_weak_and_says_so(given: list[str], cluster: None) -> None:
    more = ["search.method=asha", "search.reduction=2", "trials.workers=1", "space.generated=[2]", "space.shots=[3]"]
    more += ["space.epochs=[8]", "space.alpha=[50]", "space.lr=[1e-3, 1e-2, 3, 10, 30, 100]"]
    more.append("space.rivals={GDA: {}}")
    config = sweep(given, *more, name="halving")
    result = cafo_tune.run(config)
    rows = pq.read_table(config.run.folder / "results.parquet").to_pylist()
    assert [row["status"] for row in rows if row["rival"]] == ["finished"] * 2  # once for each seed, as in a grid
    rows = [row for row in rows if not row["rival"]]
    stopped = [row for row in rows if row["status"] == "stopped"]
    finished = {row["lr"] for row in rows if row["seed"] == 0} - {row["lr"] for row in stopped}
    assert result["stopped_early"] == len(stopped) > 0
    assert all(row["seed"] == 0 and len(row["curve"]) < 9 and row["accuracy"] is None for row in stopped)
    assert {row["lr"] for row in rows if row["seed"] == 1} == finished
    cell, rival = read_json(config.run.folder / "chosen.json")["chosen"]
    assert (rival["method"], rival["finished"], rival["stopped"]) == ("GDA", 1, 0)
    assert (cell["finished"], cell["stopped"]) == (len(finished), len(stopped))
    assert cell["setting"]["lr"] in finished

    # a lost trial comes back to the same race: those it lost against are remembered
    weak = max(stopped, key=lambda row: row["lr"])
    shutil.rmtree(config.run.folder / "trials" / weak["trial"])
    cafo_tune.run(config)
    assert read_json(config.run.folder / "trials" / weak["trial"] / "result.json")["status"] == "stopped"


@pytest.mark.ray
def test_optuna_asks_the_same_again(given: list[str], cluster: None) -> None:
    more = ["search.method=optuna", "search.samples=4", "search.suggested_at_once=2", "space.lr={low: 1e-4, high: 1}"]
    more += ["space.shots=[3]", "space.epochs=[1]", "space.rivals={nearest class mean: {}}"]
    config = sweep(given, *more, name="optuna")
    cafo_tune.run(config)
    before = pq.read_table(config.run.folder / "results.parquet").to_pylist()
    assert [row["rival"] for row in before] == [""] * 4 * 2 + ["nearest class mean"] * 2
    assert len({row["lr"] for row in before if not row["rival"]}) == 4
    stamps = {path: path.stat().st_mtime_ns for path in config.run.folder.glob("trials/*/result.json")}
    lost = config.run.folder / "trials" / before[3]["trial"]
    shutil.rmtree(lost)
    cafo_tune.run(config)
    again = pq.read_table(config.run.folder / "results.parquet").to_pylist()
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in before]
    assert [path.parent for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp] == [lost]


def private_bytes() -> int:
    """What this process alone holds; pages of the object store, which all processes map, are not among it."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Private_Clean")))


@pytest.mark.ray
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the kernel does not tell private memory")
def test_a_trial_holds_no_copy_of_the_features(tmp_path: Path, cluster: None) -> None:
    draw = np.random.default_rng(0)
    views = {"clip": draw.standard_normal((60, 1600, 1024), np.float32)}  # 393 MB, of which a trial takes half
    shared = SharedInputs(
        views=views,
        labels=np.arange(1600) % 5,
        few_shot={(16, 0): np.arange(800), (16, 1): np.arange(800, 1600)},
        generated={0: np.arange(0)},
        val={"clip": draw.normal(size=(50, 1024)).astype(np.float32)},
        val_labels=np.arange(50) % 5,
        classifiers={("clip", "templates"): draw.normal(size=(1024, 5)).astype(np.float32)},
        class_names=tuple("abcde"),
        identities={"clip": "random"},
    )
    space = SpaceConfig(shots=[16], seeds=[0, 1], epochs=[5])
    how = SearchConfig(beta_steps=5)
    trials = enumerate_trials(space, enumerate_settings(space, how, ["clip"], 60, file=False))

    # what is freed is given back at once, so that what is held can be told from what the allocator keeps
    @ray.remote(runtime_env={"env_vars": {"MALLOC_MMAP_THRESHOLD_": "65536"}})
    def measured(shared: SharedInputs) -> list[int]:
        torch.set_num_threads(1)
        held: list[int] = []
        for trial in trials:  # the first one brings PyTorch's own buffers
            held.append(private_bytes())
            run_trial(trial, shared, how, tmp_path, report=lambda curve: held.append(private_bytes()))
        return [max(held[7:]) - held[7], shared.views["clip"].flags.writeable]

    grown, writeable = ray.get(measured.remote(ray.put(shared)))
    assert not writeable
    assert grown < 800 * 60 * 1024 * 4 / 2  # keys, gradients and moments are a few MB each
