"""The demo's world: seeded, held out by content, and a base that is what the cache says."""

from itertools import islice
from pathlib import Path
from random import Random

import pytest
import yaml

from adapter import Base
from rayjobs.config import load
from rayjobs.demo import text
from rayjobs.demo.cascade import BASELINES, CASCADE
from rayjobs.demo.llama import LlamaStandIn, stand_in_llama
from rayjobs.demo.world import make_world
from rayjobs.jobs import demo
from rayjobs.tables import flat
from tests.conftest import ROOT


def test_test_notes_are_in_nothing_that_is_trained_on() -> None:
    tested = {record["input"] for task in (text.COPY, text.SPELL) for record in text.records(task, 300, 0, test=True)}
    trained = {record["input"] for task in (text.COPY, text.SPELL) for record in text.records(task, 300, 0, test=False)}
    read = " | ".join(part for document in text.documents(0, 2000) for part, _ in document)
    assert tested
    assert not tested & trained
    assert not [note for note in tested if f" {note} " in read or f" {text.words(note)} " in read]


def test_records_are_seeded_and_right() -> None:
    first = text.records(text.SPELL, 50, 3, test=False)
    assert first == text.records(text.SPELL, 50, 3, test=False)
    assert first != text.records(text.SPELL, 50, 4, test=False)
    assert text.SPELL.answer("0 7 3") == "zero seven three"
    assert text.COPY.answer("0 7 3") == "0 7 3"
    assert all(record["output"] == text.words(record["input"]) for record in first)


def test_a_tenth_or_more_of_all_notes_is_held_out() -> None:
    notes = set(islice(text.notes(Random(0), test=True), 5000))
    assert 100 < len(notes) < 300


@pytest.mark.ray
def test_cafos_ordinary_job_runs_in_the_demos_world_which_is_made_once(tmp_path: Path, cluster: None) -> None:
    few = [
        "world.digits.train=60",
        "world.digits.val=30",
        "world.digits.test=40",
        "world.clip.steps=2",
        "world.clip.batch=4",
        "world.clip.width=8",
        "world.dino.steps=2",
        "world.dino.batch=4",
        "world.drawings=2",
        "cafo.shots=[0,1]",
        "cafo.seeds=[1]",
        "cafo.generated=[1]",
        "cafo.epochs=[1]",
        f"run.storage={tmp_path}",
    ]
    settings, folder = load(demo.Config, None, few), tmp_path / "demo"
    table = demo.cafo_table(settings, folder, demo.Stages())
    assert list(table)[-8:] == [*BASELINES, *CASCADE]
    assert table["CLIP cache"]["0 shots"] == "", "no cache without images"
    assert all(table[name]["0 shots"] for name in ("… + generated", "all of CaFo"))
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert make_world(settings.world, tmp_path / "cache").digits.is_dir()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == made, "all was kept"
    shipped = yaml.safe_load((ROOT / "configs" / "cafo" / "digits.yaml").read_text())
    named = [place for place in flat(shipped).values() if place.startswith("runs/")]
    assert len(named) == 6
    assert not [place for place in named if not (tmp_path / place.removeprefix("runs/")).exists()]


def test_a_stand_in_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = LlamaStandIn(steps=3, batch=64, dim=16)
    folder = stand_in_llama(settings, tmp_path)
    made = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr("rayjobs.demo.llama._train", lambda *_: pytest.fail("trained again"))
    assert stand_in_llama(settings, tmp_path) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == made
    assert len(list((tmp_path / "demo").iterdir())) == 1, "nothing unfinished is left"
    assert len(Base.load(folder).generate(["Note"], max_new_tokens=3, temperature=0)) == 1
