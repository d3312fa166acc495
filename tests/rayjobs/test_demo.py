"""The demo's world: seeded, held out by content, and a base that is what the cache says."""

from functools import partial
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import yaml

from adapter import Base
from rayjobs.config import load
from rayjobs.demo import text
from rayjobs.demo.cascade import BASELINES, CASCADE
from rayjobs.demo.llama import LlamaStandIn, train_llama
from rayjobs.demo.world import Training, make_world, trained, world_in
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
def test_the_demo_is_a_chain_of_ordinary_jobs_in_a_world_that_is_made_once(tmp_path: Path, cluster: None) -> None:
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
        "world.notes.steps=3",
        "world.questions={reads: questions, vocab_size: 384, steps: 6}",
        "cafo.shots=[0,1]",
        "cafo.seeds=[1]",
        "cafo.generated=[1]",
        "cafo.epochs=[1]",
        "adapters.records=40",
        "adapters.held_out=10",
        "adapters.workers=1",
        "adapters.epochs=1",
        "adapters.question_epochs=0.3",
        f"run.storage={tmp_path}",
    ]
    settings, folder = load(demo.Config, None, few), tmp_path / "demo"
    result = demo.run(settings)
    rows = result["CaFo without pre-training: accuracy on test scans, %"] + result["CaFo: accuracy on test scans, %"]
    table = {row["method"]: row for row in rows}
    assert [name for name in table if not name.startswith("CLIP zero-shot")] == [*BASELINES, *CASCADE]
    assert table["CLIP cache"]["0 shots"] == "", "no cache without images"
    assert all(table[name]["0 shots"] for name in ("… + generated", "all of CaFo"))
    asked = result["LLaMA-Adapter: right answers of four options, %"]
    assert [row[""] for row in asked] == list(demo.ADAPTERS)
    report = (folder / "report.html").read_text()
    for told in (*result, "training loss of the two adapters", "data:image/jpeg"):
        assert told in report
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    world = world_in(tmp_path / "cache", settings.world)
    make_world(world, settings.world)
    assert world.digits.is_dir()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == made, "all was kept"
    shipped = yaml.safe_load((ROOT / "configs" / "cafo" / "digits.yaml").read_text())
    named = [place for place in flat(shipped).values() if place.startswith("runs/")]
    assert len(named) == 6
    assert not [place for place in named if not (tmp_path / place.removeprefix("runs/")).exists()]


def test_a_stand_in_is_a_base_like_any_other(tmp_path: Path) -> None:
    settings, folder = LlamaStandIn(steps=3, batch=64, dim=16), tmp_path / "llama"
    losses = list(trained(Training(folder, settings.steps, partial(train_llama, settings))))
    assert len(losses) == 3
    assert len(Base.load(folder).generate(["Note"], max_new_tokens=3, temperature=0)) == 1
