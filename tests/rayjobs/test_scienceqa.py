"""ScienceQA over workers: the real problems, a really trained tiny LLaMA, images read by a tower, and going on."""

import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from adapter import Base
from adapter.adaption import AdaptionConfig
from adapter.scienceqa import TEMPLATE, read_problems
from rayjobs.answers import Answerer, look
from rayjobs.config import load, to_dict
from rayjobs.jobs import adapter_eval
from rayjobs.scienceqa import AnswerProblems, asked
from tests.rayjobs.cafo_world import towers


@pytest.fixture
def settings(shared: Path, tmp_path: Path) -> adapter_eval.Config:
    """A random adapter that reads images, on stories260K."""
    tower = towers(tmp_path / "towers")["clip"]
    base = Base.load(shared / "llama" / "stories260K")
    given = {
        "base": {"path": str(shared / "llama" / "stories260K")},
        "adapter": str(tmp_path / "adapter.safetensors"),
        "vision": {"tower": tower, "bottleneck": 5},
        "task": "scienceqa",
        "data": {"path": [str(shared / "scienceqa")]},
        "batch_size": 64,
        "run": {"name": "eval", "storage": str(tmp_path / "runs")},
    }
    built = load(adapter_eval.Config, given)
    assert built.vision is not None
    base.attach(AdaptionConfig(n_layers=4, prompt_length=3, vision=built.vision.open().projection))
    for adaption in base.model.adaptions:
        torch.nn.init.constant_(adaption.gate, 1.0)
    base.save_adapter(tmp_path / "adapter.safetensors")
    return built


@pytest.mark.ray
def test_the_real_problems_are_answered_tabled_and_taken_up_again(
    settings: adapter_eval.Config, shared: Path, tmp_path: Path, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "scienceqa"
    shutil.copytree(shared / "scienceqa", copied)
    problems = read_problems(copied, "test")
    pictured = [problem for problem in problems if problem.image]
    (copied / pictured[0].image).unlink()
    (copied / pictured[1].image).write_bytes(b"no image")
    built = load(adapter_eval.Config, {**to_dict(settings), "data": {"path": [str(copied)]}})
    result = adapter_eval.run(built)
    assert (result["problems"], result["with_image"], result["unreadable_images"]) == (361, 167, 2)
    counts = result["accuracy_by_class"][0]
    assert [counts[name] for name in ("NAT", "IMG", "NO", "average")] == ["186", "167", "124", "361"]
    table = (built.run.folder / "table.md").read_text()
    assert re.search(r"\| LLaMA-Adapter 7B \(1.8 M\), published \| 84.37 \|", table)
    assert "average" in capsys.readouterr().out
    predictions = pq.read_table(built.run.folder / "predictions.parquet").to_pylist()
    assert [row["pid"] for row in predictions] == [problem.pid for problem in problems]
    assert {row["pid"] for row in predictions if row["image_error"]} == {pictured[0].pid, pictured[1].pid}
    right = sum(row["correct"] for row in predictions)
    assert result["accuracy"] == pytest.approx(100 * right / 361, abs=0.01)

    parts = sorted((built.run.folder / "parts").glob("*.parquet"))
    stamps = [path.stat().st_mtime_ns for path in parts]
    parts[2].unlink()
    assert adapter_eval.run(built) == result
    assert [path.stat().st_mtime_ns == stamp for path, stamp in zip(parts, stamps, strict=True)] == [
        i != 2 for i in range(len(parts))
    ]
    with pytest.raises(ValueError, match="other settings"):
        adapter_eval.run(load(adapter_eval.Config, {**to_dict(built), "reading": "likelihood"}))


def test_likelihoods_are_the_models_own_and_images_change_them(settings: adapter_eval.Config, shared: Path) -> None:
    sight = settings.vision.open()
    problems = [problem for problem in read_problems(shared / "scienceqa", "test") if problem.image][:3]
    pixels = [look(shared / "scienceqa" / problem.image, sight)[0] for problem in problems]
    worker = Answerer(AnswerProblems(TEMPLATE, "likelihood", 512), None, settings.base, settings.adapter, sight, "cpu")
    rows = worker.answer([asked(problem) for problem in problems], worker.see(pixels))
    blind = worker.answer([asked(problem) for problem in problems], [None] * 3)
    base = Base.load(settings.base.path)
    base.load_adapter(settings.adapter)
    for problem, row, unseen, image in zip(problems, rows, blind, worker.see(pixels), strict=True):
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
        log_p = base.model(torch.tensor([prompt + answer]), images=base.model.images([image]))[0].log_softmax(-1)
        expected = sum(log_p[len(prompt) + i - 1, id].item() for i, id in enumerate(answer))
        assert row["log_likelihoods"][1] == pytest.approx(expected, abs=1e-3)


def test_a_problem_longer_than_the_window_is_told_and_counts_as_unanswered(shared: Path) -> None:
    base = Base.load(shared / "llama" / "stories260K")
    problem = read_problems(shared / "scienceqa", "test")[0]
    long = {**asked(problem), "instruction": "why " * 600}
    for reading in ("generate", "likelihood"):
        rows = list(AnswerProblems(TEMPLATE, reading, 512).answered(base, [long, asked(problem)], [None, None]))
        assert "leaves no label" in rows[0]["error"]
        assert (rows[0]["predicted"], rows[0]["correct"], rows[1]["error"]) == (None, False, "")
