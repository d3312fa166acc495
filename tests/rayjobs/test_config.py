"""Configs: merged in order, all errors at once; every shipped file loads."""

import importlib
from pathlib import Path

import pytest
import yaml

from rayjobs.__main__ import JOBS
from rayjobs.config import describe, load, to_dict
from rayjobs.data.records import SourceConfig
from rayjobs.errors import ConfigError
from rayjobs.jobs import adapter_generate, adapter_tune, cafo_tune, demo
from rayjobs.jobs.adapter_train import Config
from tests.conftest import ROOT

GIVEN = ["base.path=b", "data.path=[d.json]", "run.name=r"]


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train: {epochs: 3, seed: 9}\noptimizer: {base_lr: 3e-4}\n")
    built = load(Config, path, [*GIVEN, "train.epochs=4"])
    assert (built.train.epochs, built.train.seed, built.train.global_batch) == (4, 9, 64)
    assert built.optimizer.base_lr == 3e-4  # PyYAML reads 3e-4 as text


def test_every_error_is_told_at_once_with_its_path() -> None:
    wrong = ["train.epoch=3", "optimizer.base_lr=fast", "zero.stage=7", "train.global_batch=0", "nonsense"]
    with pytest.raises(ConfigError) as error:
        load(Config, None, ["data.path=[d.json]", *wrong])
    text = str(error.value)
    assert "train.epoch: unknown key; did you mean train.epochs?" in text
    assert "optimizer.base_lr: " in text
    assert "'fast'" in text
    assert "zero.stage: " in text
    assert "train.global_batch: " in text
    assert "'nonsense': an override looks like section.key=value" in text
    assert "base: required, but not given" in text
    assert "run: required, but not given" in text


@pytest.mark.parametrize(("text", "message"), [("a: [1", "not valid YAML"), ("- 1", "mapping of sections")])
def test_a_file_that_is_no_config(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(Config, path)
    with pytest.raises(ConfigError, match="cannot read"):
        load(Config, tmp_path / "missing.yaml")


def test_a_config_is_frozen_and_dumps_to_what_it_was_loaded_from() -> None:
    built = load(Config, None, GIVEN)
    with pytest.raises(AttributeError):
        built.train.epochs = 3  # type: ignore[misc]
    again = load(Config, None, [f"{name}={yaml.safe_dump(value)}" for name, value in to_dict(built).items()])
    assert again == built


@pytest.mark.parametrize("job", JOBS)
def test_every_field_has_a_meaning(job: str) -> None:
    module = importlib.import_module(f"rayjobs.jobs.{job.replace('-', '_')}")
    fields = list(describe(module.Config))
    assert fields
    assert [name for name, _, _, meaning in fields if not meaning] == []


def test_every_path_starts_where_the_command_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where defaults name it, since workers and trials run elsewhere; names stay names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder").mkdir()
    (tmp_path / "t.json").touch()
    given = ["vision.encoder.weights=encoder", "data.template=t.json", "data.val_path=[{path: v.json, images: i}]"]
    swept = load(adapter_tune.Config, ROOT / "configs/adapter/scienceqa_ablations.yaml", given)
    assert swept.sweep.scienceqa is not None
    assert swept.vision is not None
    (held_out,) = swept.data.val_path
    assert isinstance(held_out, SourceConfig)
    assert [swept.base.path, *swept.data.path, held_out.path, held_out.images, swept.sweep.scienceqa.path] == [
        str(tmp_path / name) for name in ("weights/llama-7b", "data/scienceqa", "v.json", "i", "data/scienceqa")
    ]
    assert [swept.run.storage, swept.vision.encoder.weights, swept.data.template] == [
        str(tmp_path / name) for name in ("runs", "encoder", "t.json")
    ]
    features = load(cafo_tune.Config, ROOT / "configs/cafo/caltech101.yaml", ["data.generated=dalle"])
    assert [features.data.root, features.run.storage] == [str(tmp_path / name) for name in ("data", "runs")]
    assert (features.data.generated, swept.vision.encoder.name) == ("dalle", "ViT-L-14-quickgelu")
    assert load(demo.Config).run.storage == str(tmp_path / "runs")
    asked = load(
        adapter_generate.Config, {"base": {"path": "b"}, "template": "scienceqa"}, ["file=f.json", "out=o.jsonl"]
    )
    assert (asked.file, asked.out, asked.template) == (f"{tmp_path}/f.json", f"{tmp_path}/o.jsonl", "scienceqa")


JOB_CONFIGS = sorted(path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name != "cluster")


@pytest.mark.parametrize("path", JOB_CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_opens_with_its_command(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    job = first.split()[2]
    assert first.startswith("# rayjobs ")
    assert str(path.relative_to(ROOT)) in first
    load(importlib.import_module(f"rayjobs.jobs.{job.replace('-', '_')}").Config, path)
