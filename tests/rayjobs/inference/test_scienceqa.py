"""ScienceQA over workers: problems of every class, a trained small LLaMA, images read by an encoder, and going on."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from adapter import AdaptedModel
from adapter.adaption import AdaptionConfig
from adapter.records.example import encode_answered
from adapter.records.scienceqa import TEMPLATE, Problem, read_problems
from rayjobs.config import load, to_dict
from rayjobs.inference.batch import GenerationWorker, read_pixels
from rayjobs.inference.decoding import Reading
from rayjobs.inference.scienceqa import AnswerProblems, problem_record
from rayjobs.jobs import adapter_eval, adapter_generate
from rayjobs.runs.record import read_record
from rayjobs.storage.files import write_json, write_jsonl
from tests.rayjobs.cafo_dataset import make_encoders
from tests.rayjobs.pages import page_text


@pytest.fixture
def settings(trained_llama: Path, scienceqa: Path, tmp_path: Path) -> adapter_eval.Config:
    """A random adapter that reads images, on the trained LLaMA."""
    encoder = make_encoders(tmp_path / "encoders")["clip"]
    base = AdaptedModel.from_pretrained(trained_llama)
    given = {
        "base": {"path": str(trained_llama)},
        "adapter": str(tmp_path / "adapter.safetensors"),
        "vision": {"encoder": encoder, "bottleneck": 5},
        "task": "scienceqa",
        "data": {"path": [str(scienceqa)]},
        "batch_size": 12,
        "run": {"name": "eval", "storage": str(tmp_path / "runs")},
    }
    built = load(adapter_eval.Config, given)
    assert built.vision is not None
    base.add_adapter(AdaptionConfig(n_layers=4, prompt_length=3, vision=built.vision.open().projection))
    for adaption in base.model.adaptions:
        torch.nn.init.constant_(adaption.gate, 1.0)
    base.save_adapter(tmp_path / "adapter.safetensors")
    return built


@pytest.mark.ray
def test_problems_are_answered_tabled_and_taken_up_again(
    settings: adapter_eval.Config,
    scienceqa: Path,
    tmp_path: Path,
    busy_cluster: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copied = tmp_path / "scienceqa"
    shutil.copytree(scienceqa, copied)
    problems = read_problems(copied, "test")
    pictured = [problem for problem in problems if problem.image]
    (copied / pictured[0].image).unlink()
    (copied / pictured[1].image).write_bytes(b"no image")
    built = load(adapter_eval.Config, {**to_dict(settings), "data": {"path": [str(copied)]}})
    result = adapter_eval.run(built)
    assert (result["problems"], result["with_image"], result["unreadable_images"]) == (60, 24, 2)
    counts = result["accuracy_by_class"][0]
    assert [counts[name] for name in ("NAT", "IMG", "NO", "average")] == ["20", "24", "12", "60"]
    table = (built.run.folder / "table.md").read_text()
    assert re.search(r"\| LLaMA-Adapter 7B \(1.8 M\), published \| 84.37 \|", table)
    assert "average" in capsys.readouterr().out
    predictions = pq.read_table(built.run.folder / "predictions.parquet").to_pylist()
    assert [row["pid"] for row in predictions] == [problem.pid for problem in problems]
    assert {row["pid"] for row in predictions if row["image_error"]} == {pictured[0].pid, pictured[1].pid}
    report = page_text(built.run.folder)
    assert all(" ".join(row["image_error"].split()) in report for row in predictions)
    right = sum(row["correct"] for row in predictions)
    assert result["accuracy"] == pytest.approx(100 * right / 60, abs=0.01)

    parts = sorted((built.run.folder / "parts").glob("*.parquet"))
    stamps = [path.stat().st_mtime_ns for path in parts]
    parts[2].unlink()
    assert adapter_eval.run(built) == result
    assert [path.stat().st_mtime_ns == stamp for path, stamp in zip(parts, stamps, strict=True)] == [
        i != 2 for i in range(len(parts))
    ]
    before = {path.name: path.read_bytes() for path in built.run.folder.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=r"eval/parts holds results of other settings \(reading was"):
        adapter_eval.run(load(adapter_eval.Config, {**to_dict(built), "reading": "likelihood"}))
    with pytest.raises(ValueError, match=r"\(encoder was CLIP.*, now none; images was .*, now left out\)"):
        adapter_eval.run(load(adapter_eval.Config, {**to_dict(built), "vision": None, "blind": True}))
    (copied / pictured[2].image).write_bytes((copied / pictured[3].image).read_bytes())
    with pytest.raises(ValueError, match=r"\(images was [0-9a-f]{16}, now [0-9a-f]{16}\)"):
        adapter_eval.run(built)
    assert before == {path.name: path.read_bytes() for path in built.run.folder.iterdir() if path.is_file()}
    assert read_record(built.run.folder).state == "done", "what is refused leaves no trace"


@pytest.mark.ray
def test_blind_answers_say_how_many_images_were_left_out(
    settings: adapter_eval.Config, scienceqa: Path, tmp_path: Path, cluster: None
) -> None:
    few, problems = tmp_path / "few", read_problems(scienceqa, "test")[:9]
    few.mkdir()
    shutil.copy(scienceqa / "problems.json", few)
    write_json(few / "pid_splits.json", {"test": [problem.pid for problem in problems]})
    built = load(adapter_eval.Config, {**to_dict(settings), "data": {"path": [str(few)]}, "blind": True})
    result = adapter_eval.run(built)
    assert result["images_left_out"] == sum(bool(problem.image) for problem in problems) > 0
    assert result["unreadable_images"] == 0, "they are not even looked for"


def test_an_adapter_that_reads_images_is_given_its_own_encoder_or_told_to_be_blind(
    settings: adapter_eval.Config, tmp_path: Path
) -> None:
    given = {name: value for name, value in to_dict(settings).items() if name in ("base", "adapter", "vision")}
    write_jsonl(tmp_path / "file.jsonl", [{"instruction": "What is it?", "image": "a.png"}])
    of_file = {**given, "file": str(tmp_path / "file.jsonl"), "run": {"name": "asked"}}
    dino = {**given["vision"], "encoder": make_encoders(tmp_path / "others")["dino"]}
    text_only = str(tmp_path / "text.safetensors")
    base = AdaptedModel.from_pretrained(settings.base.path)
    base.add_adapter(AdaptionConfig(n_layers=2, prompt_length=3))
    base.save_adapter(text_only)
    for changes, message in [
        ({"vision": None}, r"adapter\.safetensors reads images, through the encoder CLIP-.*, or set blind=true"),
        ({"vision": dino}, r"was trained with the image encoder .*CLIP-.*, not with .*ResNet"),
        (
            {"vision": {**given["vision"], "encoder": {**given["vision"]["encoder"], "precision": "bf16"}}},
            "was trained with",
        ),
        ({"adapter": None}, "the base model alone cannot read images"),
        ({"adapter": text_only}, r"text\.safetensors cannot read images"),
    ]:
        with pytest.raises(ValueError, match=message):
            adapter_eval.plan(load(adapter_eval.Config, {**to_dict(settings), **changes}))
        with pytest.raises(ValueError, match=message):
            adapter_generate.plan(load(adapter_generate.Config, {**of_file, **changes}))
    adapter_eval.plan(load(adapter_eval.Config, {**to_dict(settings), "vision": None, "blind": True}))
    adapter_generate.plan(load(adapter_generate.Config, {**of_file, "vision": None, "blind": True}))
    adapter_generate.plan(load(adapter_generate.Config, {**of_file, "vision": None, "adapter": text_only}))
    question = {**given, "instruction": "What is it?", "vision": None}
    adapter_generate.plan(load(adapter_generate.Config, question))
    with pytest.raises(ValueError, match="image belongs to an instruction, and needs the vision section"):
        adapter_generate.plan(load(adapter_generate.Config, {**question, "image": "a.png"}))


def test_images_that_are_not_there_are_refused_before_the_model_is_loaded(
    settings: adapter_eval.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_generate, "load_on_gpu", None)
    given = {name: value for name, value in to_dict(settings).items() if name in ("base", "adapter", "vision")}
    one = {**given, "instruction": "What is it?", "image": str(tmp_path / "gone.png")}
    with pytest.raises(ValueError, match=r"gone\.png: .*[Nn]o such file"):
        adapter_generate.run(load(adapter_generate.Config, one))
    write_jsonl(tmp_path / "file.jsonl", [{"instruction": "What is it?", "image": "a.png"}])
    of_file = {**given, "file": str(tmp_path / "file.jsonl"), "run": {"name": "asked", "storage": str(tmp_path)}}
    with pytest.raises(ValueError, match=r"images: .*gone is no folder"):
        adapter_generate.run(load(adapter_generate.Config, {**of_file, "images": str(tmp_path / "gone")}))
    assert not (tmp_path / "asked").exists()


def test_likelihoods_are_the_models_own_and_images_change_them(settings: adapter_eval.Config, scienceqa: Path) -> None:
    conditioning = settings.vision.open()
    problems = [problem for problem in read_problems(scienceqa, "test") if problem.image][:3]
    pixels = [read_pixels(scienceqa / problem.image, conditioning)[0] for problem in problems]
    task = AnswerProblems(TEMPLATE, "likelihood", 512)
    worker = GenerationWorker(task, None, settings, conditioning, "cpu")
    features = worker.encode_images(pixels)
    rows = task(worker.model, [problem_record(problem) for problem in problems], features)
    blind = task(worker.model, [problem_record(problem) for problem in problems], [None] * 3)
    base = AdaptedModel.from_pretrained(settings.base.path)
    base.load_adapter(settings.adapter)
    for problem, row, unseen, image in zip(problems, rows, blind, features, strict=True):
        assert len(row["log_likelihoods"]) == len(problem.choices)
        assert row["log_likelihoods"] != pytest.approx(unseen["log_likelihoods"], abs=1e-3)
        record = problem.record(1)
        prompt = base.tokenizer.encode(TEMPLATE.render(record["instruction"], record["input"]), bos=True, eos=False)
        answer = base.tokenizer.encode(record["output"], bos=False, eos=True)
        if len(prompt) + len(answer) > 512:
            continue
        whole = base.tokenizer.encode(
            TEMPLATE.render(record["instruction"], record["input"]) + record["output"], bos=True, eos=True
        )
        answer = whole[len(prompt) :] if whole[: len(prompt)] == prompt else answer
        log_p = base.model(torch.tensor([prompt + answer]), images=base.model.batch_images([image]))[0].log_softmax(-1)
        expected = sum(log_p[len(prompt) + i - 1, id].item() for i, id in enumerate(answer))
        assert row["log_likelihoods"][1] == pytest.approx(expected, abs=1e-3)


def test_an_option_s_own_text_counts_by_its_bytes(trained_llama: Path) -> None:
    base = AdaptedModel.from_pretrained(trained_llama)
    choices = ("red", "a big red house on the hill, naïvely", "seven")
    problem = Problem(
        pid="1", question="the cat", choices=choices, answer=0, hint="", image="", subject="social science", grade=1
    )
    (row,) = AnswerProblems(TEMPLATE, "normalised", 512)(base, [problem_record(problem)], [None])
    record = problem.record()
    prompt = TEMPLATE.render(record["instruction"], record["input"])
    expected = []
    for choice in choices:
        begin, answer = encode_answered(prompt, choice, base.tokenizer)
        log_p = base.model(torch.tensor([begin + answer]))[0].log_softmax(-1)
        expected.append(sum(log_p[len(begin) + i - 1, id].item() for i, id in enumerate(answer)))
    assert row["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
    per_byte = [total / len(choice.encode()) for total, choice in zip(expected, choices, strict=True)]
    assert per_byte.index(max(per_byte)) != expected.index(max(expected)), "the length decides"
    assert row["predicted"] == "ABC"[per_byte.index(max(per_byte))]


@pytest.mark.parametrize("reading", ["generate", "likelihood", "normalised"])
def test_context_gives_way_and_options_never(trained_llama: Path, scienceqa: Path, reading: Reading) -> None:
    """A problem that is too long for question and options to fit is told, and counts as unanswered: never as an A."""
    base = AdaptedModel.from_pretrained(trained_llama)
    problem = next(problem for problem in read_problems(scienceqa, "test") if not problem.hint)
    as_it_is = problem_record(problem)
    no_room = {**as_it_is, "instruction": "why " * 600}
    shortened = problem_record(replace(problem, hint="why " * 600))
    options_lost = problem_record(replace(problem, choices=("red " * 150, "blue " * 150)))
    given = [no_room, shortened, options_lost, as_it_is]
    rows = AnswerProblems(TEMPLATE, reading, 512)(base, given, [None] * 4)
    assert [row["shortened"] for row in rows] == [False, True, False, False]
    assert "leaves no label" in rows[0]["error"]
    assert "options would be lost" in rows[2]["error"]
    assert [row["error"] for row in rows[1::2]] == ["", ""]
    assert all((row["predicted"], row["correct"]) == (None, False) for row in rows[::2])
    if reading != "generate":
        assert rows[1]["log_likelihoods"] != rows[3]["log_likelihoods"]


def test_equally_likely_options_are_no_answer(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = AdaptedModel.from_pretrained(tiny_base)
    monkeypatch.setattr(base, "losses", lambda examples, images: [2.0, 1.0, 1.0, 1.0, 2.0, 3.0])
    problem = Problem(
        pid="1", question="the", choices=("a", "b", "c"), answer=0, hint="", image="", subject="social science", grade=1
    )
    found = AnswerProblems(TEMPLATE, "likelihood", 512)(base, [problem_record(problem)] * 2, [None] * 2)
    assert [row["predicted"] for row in found] == [None, "A"]
