"""The demo's own results: answers of the adapted LLaMAs beside one another, and loss curves as text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapter.model import AdaptedModel
from adapter.records.scienceqa import LETTERS, Problem
from rayjobs.cluster.device import default_device
from rayjobs.demo import notes
from rayjobs.reporting.tables import accuracy_cell

Table = list[dict[str, Any]]
Records = list[dict[str, str]]


def held_out_records(count: int, seed: int) -> dict[str, Records]:
    """{task: test records} of the new instruction and of the one that the base knows."""
    return {task.name: notes.records(task, count, seed, test=True) for task in (notes.SPELL, notes.COPY)}


def answer_records(base: Path, adapter: Path, records: Mapping[str, Records]) -> dict[str, tuple[list[str], list[str]]]:
    """{task: answers of the base, answers with the adapter}, by greedy decoding."""
    model = AdaptedModel.from_pretrained(base, device=default_device())
    before = {task: _answers(model, of_task) for task, of_task in records.items()}
    model.load_adapter(adapter)
    return {task: (before[task], _answers(model, of_task)) for task, of_task in records.items()}


def _answers(model: AdaptedModel, records: Records) -> list[str]:
    prompts = [notes.TEMPLATE.render(record["instruction"], record["input"]) for record in records]
    return [text.strip() for text in model.generate(prompts, max_new_tokens=16, temperature=0)]


def exact_answers(
    records: Mapping[str, Records], answers: Mapping[str, tuple[list[str], list[str]]]
) -> tuple[Table, Table]:
    """Percentages of exact answers by task, and two examples of each task."""
    accuracy, examples = [], []
    for task, of_task in records.items():
        expected = [record["output"] for record in of_task]
        shares = [sum(map(str.__eq__, given, expected)) / len(of_task) for given in answers[task]]
        before, after = (accuracy_cell([share], len(of_task)) for share in shares)
        accuracy.append({"instruction": task, "frozen base": before, "with adapter": after})
        for record, of_base, adapted in list(zip(of_task, *answers[task], strict=True))[:2]:
            question = {"instruction": record["instruction"], "note": record["input"]}
            examples.append({**question, "frozen base": of_base, "with adapter": adapted})
    return accuracy, examples


def compare_answers(problems: Sequence[Problem], predictions: Mapping[str, Table], count: int = 3) -> Table:
    """Some questions about scans, with the answer of each adapter.

    predictions: {adapter: a row of adapter-eval's predictions for each problem}.
    """
    rows = []
    for i in [i for i, problem in enumerate(problems) if problem.image][:count]:
        problem = problems[i]
        options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem.choices, strict=False))
        truth = f"{problem.choices[problem.answer]} ({LETTERS[problem.answer]})"
        answers = {name: of[i]["text"].strip().removeprefix("The answer is ") for name, of in predictions.items()}
        rows.append({"options": options, "it shows": truth, **answers})
    return rows


def sparkline(metrics: Table, width: int = 24) -> dict[str, str]:
    """A loss curve as one line of text, on a logarithmic scale, between its first and last values."""
    losses = np.array([row["loss"] for row in metrics if "loss" in row])
    heights = [float(np.log(max(part.mean(), 1e-9))) for part in np.array_split(losses, min(width, len(losses)))]
    low, high = min(heights), max(heights)
    bars = "▁▂▃▄▅▆▇█"
    line = "".join(bars[round((height - low) / max(high - low, 1e-9) * (len(bars) - 1))] for height in heights)
    return {"first": f"{losses[0]:.3f}", "log of the loss over steps": line, "last": f"{losses[-1]:.3f}"}
