"""The demo's world: seeded, held out by content, and a base that is what the cache says."""

import re
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import yaml

from adapter import AdaptedModel
from rayjobs.config import flatten, load
from rayjobs.console import setup_logging
from rayjobs.demo import notes
from rayjobs.demo.cafo_settings import BASELINES, CASCADE
from rayjobs.demo.config import TinyLlamaConfig
from rayjobs.demo.json_answers import held_out_records
from rayjobs.demo.llama import train_llama
from rayjobs.demo.world import Training, train_model
from rayjobs.jobs import demo
from rayjobs.storage.files import read_json
from tests.conftest import ROOT


def test_test_notes_are_in_nothing_that_is_trained_on() -> None:
    tested = {
        record["input"] for task in (notes.COPY, notes.SPELL) for record in notes.records(task, 300, 0, test=True)
    }
    trained = {
        record["input"] for task in (notes.COPY, notes.SPELL) for record in notes.records(task, 300, 0, test=False)
    }
    read = " | ".join(part for document in notes.documents(0, 2000) for part, _ in document)
    assert tested
    assert not tested & trained
    assert not [note for note in tested if f" {note} " in read or f" {notes.words(note)} " in read]


def test_records_are_seeded_and_right() -> None:
    first = notes.records(notes.SPELL, 50, 3, test=False)
    assert first == notes.records(notes.SPELL, 50, 3, test=False)
    assert first != notes.records(notes.SPELL, 50, 4, test=False)
    assert notes.SPELL.answer("0 7 3") == "zero seven three"
    assert notes.COPY.answer("0 7 3") == "0 7 3"
    assert all(record["output"] == notes.words(record["input"]) for record in first)


def test_a_tenth_or_more_of_all_notes_is_held_out() -> None:
    found = set(islice(notes.sample_notes(Random(0), test=True), 5000))
    assert 100 < len(found) < 300


FEW = [
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
    "pretrained.use=false",
]


@pytest.fixture(scope="module")
def storage(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a demo that was run, and `terminal.txt`, what its terminal showed."""
    storage = tmp_path_factory.mktemp("storage")
    setup_logging()
    with (storage / "terminal.txt").open("w") as terminal, redirect_stdout(terminal), redirect_stderr(terminal):
        demo.run(load(demo.Config, None, [*FEW, f"run.storage={storage}"]))
    return storage


@pytest.mark.ray
@pytest.mark.slow
def test_the_demo_is_a_chain_of_ordinary_jobs(storage: Path) -> None:
    folder = storage / "demo"
    result = read_json(folder / "result.json")
    rows = result["CaFo without pre-training: accuracy on test scans, %"] + result["CaFo: accuracy on test scans, %"]
    table = {row["method"]: row for row in rows}
    assert [name for name in table if not name.startswith("CLIP zero-shot")] == [*BASELINES, *CASCADE]
    assert table["CLIP cache"]["0 shots"] == "", "no cache without images"
    assert all(table[name]["0 shots"] for name in ("… + generated", "all of CaFo"))
    asked = result["LLaMA-Adapter: right answers of four options, %"]
    assert [row[""] for row in asked] == list(demo.ADAPTERS)
    shipped = yaml.safe_load((ROOT / "configs" / "cafo" / "digits.yaml").read_text())
    named = [place for place in flatten(shipped).values() if place.startswith("runs/")]
    assert len(named) == 6
    assert not [place for place in named if not (storage / place.removeprefix("runs/")).exists()]


@pytest.mark.ray
@pytest.mark.slow
def test_its_report_opens_with_what_it_shows_and_leads_to_each_step(storage: Path) -> None:
    folder = storage / "demo"
    report, result = (folder / "report.html").read_text(), read_json(folder / "result.json")
    assert "30 validation scans; only then were the 40 test scans opened, once" in report
    titles = ["training loss of the two adapters", "accuracy over shots, digits", "data:image/jpeg"]
    titles += [
        "accuracy over α and β, on the images of the choice",
        "confusion on test",
        "accuracy of each class on test",
    ]
    for text in (*(name for name in result if name not in ("headline", "about", "reports of the steps")), *titles):
        assert text in report
    steps = [row["step"] for row in result["reports of the steps"]]
    assert len(steps) == 5
    assert all(f"<summary>{step}</summary>" in report for step in steps), "all in one file"
    assert set(re.findall(r'<a href="(.)', report)) == {"#"}


@pytest.mark.ray
@pytest.mark.slow
def test_a_second_run_trains_nothing_and_says_when_it_was_done(
    storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [*(storage / "cache").rglob("*"), *(storage / "demo").glob("*/trials/*/*"), *storage.rglob("*.safetensors")]
    before = {path: path.stat().st_mtime_ns for path in made}
    assert len([path for path in before if path.suffix == ".safetensors"]) > 10
    first = read_json(storage / "demo" / "result.json")
    second = demo.run(load(demo.Config, None, [*FEW, f"run.storage={storage}"]))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    terminal = capsys.readouterr().err
    for number in range(1, 5):
        assert re.search(rf"^{number}/4  .*\(from the cache\)$", terminal, re.M)
    cached = [{**row, "made": "before, from the cache"} for row in first["seconds"]]
    assert cached[0]["seconds"].isdigit()
    assert second == {**first, "seconds": cached}


@pytest.mark.ray
@pytest.mark.slow
def test_the_terminal_shows_stages_time_left_answers_and_where_the_report_is(storage: Path) -> None:
    terminal, result = (storage / "terminal.txt").read_text(), read_json(storage / "demo" / "result.json")
    for number in range(1, 5):
        assert re.search(rf"^{number}/4  .*\(about \d+ s left in all\)$", terminal, re.M)
    assert len(result["answers about scans"]) == 3
    for row in result["answers about scans"]:
        assert all(row[name] in terminal for name in demo.ADAPTERS)
    assert f"report: {storage / 'demo' / 'report.html'}" in terminal


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_llama_learns_to_answer_in_json(cluster: None, smollm2_gguf: Path, tmp_path: Path) -> None:
    settings = load(demo.Config, None, [f"run.storage={tmp_path}", "pretrained.held_out=60"])
    tables, metrics = demo.run_json_answers(settings, smollm2_gguf, {"json": "json"})
    accuracy, examples = tables.values()
    assert metrics[-1]["step"] == 30
    assert [row["frozen base"] for row in accuracy] == ["0 [0, 9] (0 of 40)", "0 [0, 16] (0 of 20)"]
    assert all(float(row["with adapter"].split()[0]) > 80 for row in accuracy)
    assert [row["logits, adapter taken off"] for row in accuracy] == ["the base's"] * 2
    assert {row["instruction"] for row in examples} <= {
        record["instruction"] for of_new in held_out_records(60, 0).values() for record in of_new
    }


def test_a_stand_in_is_a_base_like_any_other_and_the_same_in_every_run(tmp_path: Path) -> None:
    settings = TinyLlamaConfig(steps=3, batch=64, dim=16)
    losses = [
        list(train_model(Training(tmp_path / name, settings.steps, partial(train_llama, settings)))) for name in "ab"
    ]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]
    assert len(AdaptedModel.from_pretrained(tmp_path / "a").generate(["Note"], max_new_tokens=3, temperature=0)) == 1
    assert (
        AdaptedModel.from_pretrained(tmp_path / "a").fingerprint
        == AdaptedModel.from_pretrained(tmp_path / "b").fingerprint
    )
