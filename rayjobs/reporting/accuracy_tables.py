"""Test accuracies as tables in the paper's shape, with the paper's own figures where they belong."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cafo import paper_results
from cafo.ensemble import NOTHING, table5
from cafo.ensemble import ZERO_SHOT as ON_ZERO_SHOT
from rayjobs.models.encoder import VisionEncoderConfig
from rayjobs.storage.files import write_text

ZERO_SHOT = "CLIP zero-shot"


def summary(accuracies: Sequence[float]) -> str:
    """Mean ± sample standard deviation, in percent; the mean alone where nothing varies, as without shots."""
    mean = f"{100 * statistics.mean(accuracies):.2f}"
    return f"{mean} ± {100 * statistics.stdev(accuracies):.2f}" if len(set(accuracies)) > 1 else mean


def published_rows(
    data_set: str, target: str, encoders: Mapping[str, VisionEncoderConfig], settings: Sequence[Mapping[str, Any]]
) -> dict[str, dict[int, float]]:
    """{row: {shots: the paper's accuracy in percent}} where data sets and encoders are the paper's; else nothing.

    Args:
        data_set: the one that was tuned on.
        target: the one whose test images are scored; another one is a distribution shift.
        settings: those that were chosen, as `chosen.json` has them: they tell which rows of the cascade to show.
    """
    sets = dict.fromkeys(tuple(setting["encoders"]) for setting in settings)
    pairs = {names: pair for names in sets if _papers_clip(pair := {name: encoders[name] for name in names})}
    if len(pairs) > 1:  # several CLIPs side by side: a row for each
        found = {names: published_rows(data_set, target, pair, []) for names, pair in pairs.items()}
        return {f"{' + '.join(names)}, published": row for names, rows in found.items() for row in rows.values()}
    clip = _papers_clip(encoders)
    if target != data_set:
        shift = data_set == "imagenet" and clip == "RN50" and target in paper_results.SHIFT
        return {"CaFo, published": {16: paper_results.SHIFT[target]}} if shift else {}
    if clip == "RN50" and data_set in paper_results.RN50:
        row = dict(zip(paper_results.SHOTS, paper_results.RN50[data_set], strict=True))
    elif data_set == "imagenet" and clip in paper_results.IMAGENET_16_SHOT:
        row = {16: paper_results.IMAGENET_16_SHOT[clip]}
    else:
        return {}
    if data_set != "imagenet" or clip != "RN50":
        return {"CaFo, published": row}
    parts = dict.fromkeys(_cascade_row(encoders, setting) for setting in settings)
    cascade = {
        f"{name}, published": dict(zip(paper_results.CASCADE_SHOTS, paper_results.IMAGENET_CASCADE[name], strict=True))
        for name in parts
        if name and name != "all"
    }
    return {**cascade, "CaFo, published": {0: paper_results.IMAGENET_ZERO_SHOT, **row}}


def _papers_clip(encoders: Mapping[str, VisionEncoderConfig]) -> str:
    """The CLIP of a pair of OpenAI's CLIP and DINO's ResNet-50; empty for anything else."""
    clips = {e.name.removesuffix("-quickgelu") for e in encoders.values() if e.kind == "clip" and e.weights == "openai"}
    dinos = [
        e for e in encoders.values() if e.kind == "dino" and e.name in ("", "resnet50") and "random:" not in e.weights
    ]
    return clips.pop() if dinos and len(clips) == 1 and len(encoders) == 2 else ""


def _cascade_row(encoders: Mapping[str, VisionEncoderConfig], setting: Mapping[str, Any]) -> str:
    rule = table5(tuple(setting["encoders"]))[setting["ensemble"]]
    kinds = {encoders[name].kind for name in rule.sources or setting["encoders"]}
    # the paper's DINO cache knows no text; all other rows stand on p_ZS
    if rule.rule != "adaptive" or rule.baseline != (NOTHING if kinds == {"dino"} else ON_ZERO_SHOT):
        return ""
    return paper_results.cascade_row(
        clip="clip" in kinds,
        dino="dino" in kinds,
        generated=setting["generated"] > 0,
        sentences=setting["sentences"] == "file",
    )


def by_method(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, dict[int, list[float]]], dict[str, float]]:
    """{method: {shots: accuracies in percent}} and {method: accuracy} of what has no shots, from rows of one target, in
    the table's order."""
    methods: dict[str, dict[int, list[float]]] = {}
    level: dict[str, float] = {}
    for row in sorted(rows, key=_most_first):
        if row["shots"] is None:
            level[row["method"]] = 100 * row["accuracy"]
        else:
            methods.setdefault(row["method"], {}).setdefault(row["shots"], []).append(100 * row["accuracy"])
    return methods, level


def accuracy_table(
    rows: Sequence[Mapping[str, Any]], paper: Mapping[str, Mapping[int, float]]
) -> tuple[list[str], list[list[str]]]:
    """Shots across, methods down: (columns, lines) from rows {method, shots, accuracy} of one target.

    A row without shots holds at all of them. The paper's rows follow, where they have one of our shots.
    """
    shots = sorted({row["shots"] for row in rows if row["shots"] is not None})
    lines = []
    # the most shots know all methods in their order; K = 0 only those with generated images
    for name in dict.fromkeys(row["method"] for row in sorted(rows, key=_most_first)):
        mine = [row for row in rows if row["method"] == name]
        cells = [[row["accuracy"] for row in mine if row["shots"] in (None, k)] for k in shots]
        lines.append([name, *[summary(cell) if cell else "" for cell in cells]])
    for name, row in paper.items():
        if set(row) & set(shots):
            lines.append([name, *[f"{row[k]:.2f}" if k in row else "" for k in shots]])
    return ["method", *[f"{k} shots" if k != 1 else "1 shot" for k in shots]], lines


def _most_first(row: Mapping[str, Any]) -> float:
    return -math.inf if row["shots"] is None else -row["shots"]


def write_tables(folder: Path, tables: Mapping[str, tuple[list[str], list[list[str]]]]) -> None:
    """`table.md` with all targets, and a CSV for each."""
    text = []
    for target, (columns, lines) in tables.items():
        cells = [columns, ["---"] + ["---:"] * (len(columns) - 1), *lines]
        text.append(f"### {target}: test accuracy, %\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in cells))
        written = io.StringIO()
        csv.writer(written, lineterminator="\n").writerows([columns, *lines])
        write_text(folder / f"table-{target}.csv", written.getvalue())
    write_text(folder / "table.md", "\n".join(text))
