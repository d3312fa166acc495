"""Configs: merged in order, all errors at once; every shipped file loads."""

import functools
import importlib
import json
import os
from collections.abc import Container
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from rayjobs.__main__ import JOBS
from rayjobs.config import config, given_values, iter_paths, load, to_dict
from rayjobs.config_fields import describe, describe_sections
from rayjobs.data.records import SourceConfig
from rayjobs.errors import ConfigError
from rayjobs.jobs import adapter_generate, adapter_tune, cafo_tune, demo
from rayjobs.jobs.adapter_train import Config
from rayjobs.storage.paths import AnyPath, FileOrName
from rayjobs.storage.yaml_file import write_yaml
from rayjobs.tune.search_space import Range, SpaceConfig
from rayjobs.tune.sweep_config import SweepConfig
from tests.conftest import ROOT

GIVEN = ["base.path=b", "data.path=[d.json]", "run.name=r"]


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train: {epochs: 3, seed: 9}\noptimizer: {base_lr: 3e-4}\n")
    built = load(Config, path, [*GIVEN, "train.epochs=4"])
    assert (built.train.epochs, built.train.seed, built.train.global_batch) == (4, 9, 64)
    assert built.optimizer.base_lr == 3e-4  # YAML 1.1 reads 3e-4 as text


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
    assert "base.path: required, but not given" in text
    assert "run.name: required, but not given" in text


def test_an_unknown_key_beside_a_missing_one_is_taken_for_it() -> None:
    with pytest.raises(ConfigError) as error:
        load(Config, None, [*GIVEN, "vision.tower.kind=clip"])
    assert str(error.value).splitlines() == [
        "vision.encoder.kind: required, but not given",
        "vision.tower: unknown key; did you mean vision.encoder? (vision has encoder, scales, bottleneck, mode, "
        "augment, min_area, flips, batch)",
    ]
    with pytest.raises(
        ConfigError, match=r"^vision\.scale: unknown key; did you mean vision\.scales\? \(vision has [\w, ]+\)$"
    ):
        load(Config, None, [*GIVEN, "vision.scale=3", "vision.encoder.kind=clip"])


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
    values = to_dict(built)
    overrides = [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()]
    assert load(Config, values) == load(Config, None, overrides) == built


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
    assert first.startswith(f"# rayjobs {job} --config {path.stem}")
    load(importlib.import_module(f"rayjobs.jobs.{job.replace('-', '_')}").Config, path)


@config
class Section:
    """Fields of every kind."""

    text: str = ""
    """Text."""
    maybe: str | None = "x"
    """Text or nothing."""
    choice: Literal["on", "off"] = "on"
    """One of two."""
    path: AnyPath = ""
    """A path."""
    file: FileOrName = "a"
    """A file or a name."""
    flag: bool = False
    """A switch."""
    count: int | None = 3
    """A number or nothing."""
    rate: float = 1.0
    """A fraction."""
    texts: list[str] = Field(default_factory=list)
    """Several texts."""
    paths: list[AnyPath] = Field(default_factory=list)
    """Several paths."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Free-form values."""
    mixed: str | list[str] = "a"
    """One text or several."""


@config
class Kinds:
    """A config with sections by name."""

    section: Section = Section()
    named: dict[str, Section] = Field(default_factory=dict)


def value(override: str) -> Any:
    return getattr(load(Kinds, None, [f"section.{override}"]).section, override.partition("=")[0])


TEXT_TYPES = ("text", "path", "local path", "file or name", "path or name")
TYPED = [
    "Explain issue #5",
    "#tag",
    "~",
    "",
    "a: b",
    "42",
    "3e-4",
    "yes",
    "null",
    "'quoted'",
    '"',
    "a=b",
    "[1",
    "a\nb\n",
    " ",
]


@pytest.mark.parametrize("text", TYPED)
def test_text_is_taken_as_it_was_typed(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert value(f"text={text}") == text
    assert value(f"file={text}") == text
    assert value(f"maybe={text}") == (None if text == "null" else text)
    assert value(f"path={text}") == os.path.abspath(text)
    assert load(Kinds, None, [f"named.a.text={text}"]).named["a"].text == text


@pytest.mark.parametrize("job", JOBS)
def test_every_text_setting_of_a_job_takes_its_argument_verbatim(job: str) -> None:
    module = importlib.import_module(f"rayjobs.jobs.{job.replace('-', '_')}")
    names = [field.name for field in describe(module.Config) if field.type.removesuffix(" or null") in TEXT_TYPES]
    assert names
    values, problems = given_values(module.Config, None, [f"{name}=#5: yes" for name in names])
    assert not problems
    for name in names:
        assert functools.reduce(lambda section, key: section[key], name.split("."), values) == "#5: yes"


ZERO = {
    "options.reduce_bucket_size": ("5e8", lambda zero: zero.reduce_bucket_size, 500_000_000),
    "offload_optimizer": ("{device: cpu, buffer_count: 4e0}", lambda zero: zero.offload_optimizer.buffer_count, 4),
    "offload_param.buffer_size": ("1.5e8", lambda zero: zero.offload_param.buffer_size, 150_000_000),
}


@pytest.mark.parametrize("name", ZERO)
def test_scientific_notation_reaches_deepspeed_as_a_whole_number(name: str, tmp_path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from rayjobs.train.engine import deepspeed_config

    text, read, expected = ZERO[name]
    section, _, key = name.partition(".")
    path = tmp_path / "zero.yaml"
    path.write_text(f"zero: {{{section}: {{{key}: {text}}}}}" if key else f"zero: {{{section}: {text}}}")
    for given, overrides in ((None, [*GIVEN, f"zero.{name}={text}"]), (path, GIVEN)):
        zero = load(Config, given, overrides).zero
        reached = read(DeepSpeedZeroConfig(**deepspeed_config(zero, None)["zero_optimization"]))
        assert (reached, type(reached)) == (expected, int)


def test_scientific_notation_reaches_trials_as_the_number_of_their_field() -> None:
    axes = {"adapter.n_layers": [2.0], "optimizer.base_lr": [5e-3], "train.global_batch": [1e1]}
    assert (
        load(
            SweepConfig, None, ["axes={adapter.n_layers: [2e0], optimizer.base_lr: [5e-3], train.global_batch: [1e1]}"]
        ).axes
        == axes
    )
    own = load(Config, None, GIVEN + [f"{name}={values[0]}" for name, values in axes.items()])
    assert (own.adapter.n_layers, own.optimizer.base_lr, own.train.global_batch) == (2, 5e-3, 10)
    assert all(type(number) is int for number in (own.adapter.n_layers, own.train.global_batch))


def test_numbers_switches_lists_and_mappings_are_yaml() -> None:
    assert value("choice=off") == "off"
    assert (value("flag=true"), value("flag=no"), value("count=null"), value("count=4")) == (True, False, None, 4)
    assert (value("rate=3e-4"), value("rate=5e8"), value("rate=2")) == (3e-4, 5e8, 2.0)
    assert value("texts=[yes, no, '42', a b, 2026-01-01]") == ["yes", "no", "42", "a b", "2026-01-01"]
    assert value("paths=[a]") == [os.path.abspath("a")]
    assert value("mixed=[a, b]") == ["a", "b"]
    assert value("options={lr: 3e-4, on: yes, empty: , deep: {b: [5e8]}}") == {
        "lr": 3e-4, "on": "yes", "empty": None, "deep": {"b": [5e8]}
    }  # fmt: skip
    (typed,) = (load(Kinds, None, [f"section.options.{key}"]).section.options for key in ("bucket=5e8",))
    assert typed == {"bucket": 500_000_000}
    for wrong in ("count=many", "flag=maybe", "texts=42", "options=[1"):
        with pytest.raises(ConfigError, match=f"section.{wrong.partition('=')[0]}: "):
            value(wrong)


def test_values_by_key_are_taken_as_they_are() -> None:
    built = load(
        Kinds, {"section": {"count": 4}}, {"section.text": "'a'", "section.options.b": [1], "named": {"c": {}}}
    )
    assert (built.section.count, built.section.text, built.section.options) == (4, "'a'", {"b": [1]})
    assert list(built.named) == ["c"]
    with pytest.raises(ConfigError, match="'text' is a value"):
        load(Kinds, {"section": {"text": "a"}}, {"section.text.b": 1})


def test_a_file_is_yaml_1_2(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("section: {text: no, file: 2026-01-01, options: {bucket: 5e8, on: off, when: 2026-01-01}}\n")
    section = load(Kinds, path).section
    assert (section.text, section.file) == ("no", "2026-01-01")
    assert section.options == {"bucket": 500_000_000, "on": "off", "when": "2026-01-01"}
    path.write_text("section: {text: a, text: b}\n")
    with pytest.raises(ConfigError, match=r'c\.yaml: not valid YAML: .*duplicate key "text"'):
        load(Kinds, path)
    write_yaml(path, to_dict(load(Kinds, None, ["section.text=yes", "section.maybe=5e8", "section.file=~"])))
    assert load(Kinds, path).section.maybe == "5e8"


@pytest.mark.parametrize("job", JOBS)
def test_help_shows_the_defaults_that_a_job_has(job: str) -> None:
    """Also of a section whose default differs from its own fields' defaults."""
    cls = importlib.import_module(f"rayjobs.jobs.{job.replace('-', '_')}").Config
    helps = {field.name: field for field in describe(cls)}
    values: dict[str, Any] = {}
    for name, field in cls.__pydantic_fields__.items():
        if not field.is_required() and is_dataclass(default := field.get_default(call_default_factory=True)):
            values |= nested(to_dict(default), name, helps)
    shown = {name: helps[name].default for name in values if not helps[name].default.startswith("required")}
    here = f"{os.getcwd()}/"
    assert shown == {
        name: values[name].removeprefix(here)
        if isinstance(values[name], str) and values[name]
        else json.dumps(values[name])
        for name in shown
    }


def nested(values: dict[str, Any], prefix: str, known: Container[str]) -> dict[str, Any]:
    """The values of nested sections by those of their dotted keys that are known."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}.{name}"
        if key in known:
            flat[key] = value
        elif isinstance(value, dict):
            flat |= nested(value, key, known)
    return flat


def test_the_paths_of_a_config_in_all_its_sections() -> None:
    given = ["data.path=[/a, {path: s3://b/c, images: /d}]", "base.path=/e", "run.name=r", "run.storage=s3://f/g"]
    built = load(Config, None, [*given, "vision.encoder.kind=clip", "vision.encoder.weights=s3://h/i"])
    assert {"/a", "s3://b/c", "/d", "/e", "s3://f/g", "s3://h/i"} <= set(iter_paths(built))
    assert "r" not in set(iter_paths(built))


def test_help_of_optional_and_mixed_fields() -> None:
    trained = {field.name: field for field in describe(Config)}
    assert trained["vision.encoder.kind"].default == "required if `vision` is given"
    assert trained["base.path"].default == "required"
    tuned = {field.name: field for field in describe(cafo_tune.Config)}
    assert (tuned["trials.workers.max"].default, tuned["trials.gpus_per_worker"].default) == ("2", "0.0")
    assert tuned["space.lr"][1:3] == ("list[float] or {low, high}", "[0.001]")


def test_one_item_stands_for_a_list_of_it() -> None:
    assert (value("texts=a b"), value("paths=/a"), value("mixed=a")) == (["a b"], ["/a"], "a")
    built = load(Config, None, ["base.path=b", "data.path=/d.json", "run.name=r"])
    assert built.data.path == ["/d.json"]
    assert load(SpaceConfig, None, ["shots=4", "lr=1e-2"]).shots == [4]
    assert load(SpaceConfig, None, ["lr=1e-2"]).lr == [0.01]
    assert load(SpaceConfig, None, ["lr={low: 1e-4, high: 1e-2}"]).lr == Range(low=1e-4, high=1e-2)
    assert load(SpaceConfig, None, ["encoders=clip"]).encoders == [["clip"]]
    assert load(SpaceConfig, {"shots": 4, "ensemble": "average"}).ensemble == ["average"]
    assert load(Kinds, {"named": {"a": {"texts": "b"}}}).named["a"].texts == ["b"]
    assert load(SweepConfig, {"axes": {"adapter.method": "prefix", "train.seed": 3}}).axes == {
        "adapter.method": ["prefix"], "train.seed": [3]
    }  # fmt: skip


def test_help_names_types_as_they_are_written() -> None:
    shown = {field.name.removeprefix("section."): (field.type, field.default) for field in describe(Kinds)}
    assert shown == {
        "text": ("text", '""'),
        "maybe": ("text or null", "x"),
        "choice": ("on | off", "on"),
        "path": ("path", '""'),
        "file": ("file or name", "a"),
        "flag": ("true | false", "false"),
        "count": ("int or null", "3"),
        "rate": ("float", "1.0"),
        "texts": ("list[text]", "[]"),
        "paths": ("list[path]", "[]"),
        "options": ("mapping", "{}"),
        "mixed": ("text or list[text]", "a"),
        "named": (f"mapping[{{{', '.join(field.name for field in fields(Section))}}}]", "{}"),
    }


def test_an_error_in_a_list_names_the_place() -> None:
    with pytest.raises(ConfigError) as error:
        load(Config, {"data": {"path": ["a.json", {"path": "b", "formatt": "x"}, 3]}}, ["base.path=b", "run.name=r"])
    text = str(error.value)
    assert "data.path.1.formatt: unknown key" in text
    assert "data.path.2: " in text
    assert "function-after" not in text


def test_a_value_that_fits_no_member_of_a_union_is_one_line() -> None:
    def message(**given: object) -> str:
        with pytest.raises(ConfigError) as error:
            load(cafo_tune.Config, {"encoders": {}, "data": {}, "run": {"name": "r"}, **given})
        return "\n".join(line for line in str(error.value).splitlines() if not line.startswith("encoders"))

    assert message(space={"lr": "fast"}) == "space.lr: must be list[float] or {low, high}, got 'fast'"
    assert message(space={"lr": [0.1, "fast"]}).startswith("space.lr.1: must be a valid number")
    with pytest.raises(ConfigError) as error:
        load(Config, {"base": {"path": "b"}, "data": {"path": [{"path": "b", "format": "x"}]}, "run": {"name": "r"}})
    (line,) = str(error.value).splitlines()
    assert line.startswith("data.path.0.format: must be 'auto', ")


def test_help_names_bounds_and_the_sections() -> None:
    sections = {section.name: section for section in describe_sections(Config)}
    names = list(sections)
    assert names.index("vision") + 1 == names.index("vision.encoder")
    assert sections["train"].meaning == "Training recipe. The defaults are those of LLaMA-Adapter on Alpaca."
    assert sections["vision"].meaning == "Image encoder and projection; null leaves the records' images out."
    assert [field for section in sections.values() for field in section.fields if not field.name] == []
    assert sorted(field.name for section in sections.values() for field in section.fields) == sorted(
        field.name for field in describe(Config)
    )
    types = {field.name: field.type for field in describe(Config)}
    assert types["data.val_fraction"] == "float ≥ 0 and < 1"
    assert types["train.validate_every_steps"] == "int ≥ 1 or null"
    assert types["base.tokenizer"] == "path or hub id or null"


@pytest.mark.parametrize(("given", "hint"), [
    ("train.epoch=3", "did you mean train.epochs? (train has epochs, warmup_epochs, "),
    ("train.base_lr=3", "did you mean optimizer.base_lr? (train has epochs, "),
    ("optimizer.lr=3", "did you mean optimizer.base_lr? (optimizer has base_lr, betas, weight_decay, clip_norm)"),
    ("train.xyz=3", "train has epochs, "),
    ("trian.epochs=3", "did you mean train? (this job has base, data, adapter, "),
    ("data.val_path=[{path: a, formatt: x}]", "did you mean data.val_path.0.format? (data.val_path.0 has path, "),
])  # fmt: skip
def test_an_unknown_key_says_what_there_is(given: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(Config, None, [*GIVEN, given])
    assert f"unknown key; {hint}" in str(error.value)
