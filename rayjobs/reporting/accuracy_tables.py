"""Tables of test accuracies as the paper prints them, with the paper's own accuracies beside ours."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cafo import paper_results
from cafo.ensemble import NOTHING, table5
from cafo.ensemble import ZERO_SHOT as ON_ZERO_SHOT
from rayjobs.models.encoder import VisionEncoderConfig
from rayjobs.reporting.tables import accuracy_cell, markdown_table, write_csv
from rayjobs.storage.files import write_text

ZERO_SHOT = "CLIP zero-shot"
PUBLISHED = "CaFo, published"

ColumnsAndLines = tuple[list[str], list[list[str]]]
"""The columns of a table, and its lines."""


def published_rows(
    data_set: str, target: str, encoders: Mapping[str, VisionEncoderConfig], settings: Sequence[Mapping[str, Any]]
) -> dict[str, dict[int, float]]:
    """The papers' accuracies, {row: {shots: percent}}, where data sets and encoders are the papers'; else no rows.

    Args:
        data_set: the data set that was tuned on.
        target: the data set whose test images are scored; if it is another one, there is a distribution shift.
        encoders: the configured encoders by name.
        settings: the chosen settings, as in `chosen.json`; they decide which rows of the paper's cascade are shown, and
            which rivals' rows, which say what their authors chose hyperparameters on.
    """
    own = [setting for setting in settings if not setting.get("rival")]
    rivals = [setting for setting in settings if setting.get("rival")]
    of_cafo = _published_cafo(data_set, target, encoders, own)
    return {**of_cafo, **_published_rivals(data_set, target, encoders, rivals)}


def _published_cafo(
    data_set: str, target: str, encoders: Mapping[str, VisionEncoderConfig], settings: Sequence[Mapping[str, Any]]
) -> dict[str, dict[int, float]]:
    pairs = _papers_pairs(encoders, settings)
    if len(pairs) > 1:  # several CLIPs side by side: a row for each
        return {
            f"{' + '.join(names)}, published": row
            for names, pair in pairs.items()
            for row in _published_by_clip(data_set, target, _papers_clip(pair)).values()
        }
    clip = _papers_clip(encoders)
    rows = _published_by_clip(data_set, target, clip)
    if rows and target == data_set == "imagenet" and clip == "RN50":
        return {**_published_cascade(encoders, settings), **rows}
    return rows


def _published_rivals(
    data_set: str, target: str, encoders: Mapping[str, VisionEncoderConfig], settings: Sequence[Mapping[str, Any]]
) -> dict[str, dict[int, float]]:
    rows: dict[str, dict[int, float]] = {}
    for setting in settings:
        name, encoder = setting["rival"], encoders[setting["encoders"][0]]
        figures = paper_results.RIVALS_RN50.get(name, {}).get(data_set)
        if figures and target == data_set and _openai_clip(encoder) == "RN50":
            chosen_on = paper_results.RIVALS_CHOSE_ON.get(name, "all of val")
            rows[f"{name}, published, chosen on {chosen_on}"] = dict(zip(paper_results.SHOTS, figures, strict=True))
    return rows


def _openai_clip(encoder: VisionEncoderConfig) -> str:
    """The name of one of OpenAI's CLIPs; empty for another encoder."""
    return encoder.name.removesuffix("-quickgelu") if (encoder.kind, encoder.weights) == ("clip", "openai") else ""


def _papers_pairs(
    encoders: Mapping[str, VisionEncoderConfig], settings: Sequence[Mapping[str, Any]]
) -> dict[tuple[str, ...], dict[str, VisionEncoderConfig]]:
    """The sets of encoders among the settings that are the paper's, by their names."""
    sets = dict.fromkeys(tuple(setting["encoders"]) for setting in settings)
    pairs = {names: {name: encoders[name] for name in names} for names in sets}
    return {names: pair for names, pair in pairs.items() if _papers_clip(pair)}


def _published_by_clip(data_set: str, target: str, clip: str) -> dict[str, dict[int, float]]:
    """The paper's row of the full method with one of its CLIPs, if it has one."""
    if target != data_set:
        shift = data_set == "imagenet" and clip == "RN50" and target in paper_results.SHIFT
        return {PUBLISHED: {16: paper_results.SHIFT[target]}} if shift else {}
    if clip == "RN50" and data_set in paper_results.RN50:
        zero_shot = {0: paper_results.IMAGENET_ZERO_SHOT} if data_set == "imagenet" else {}
        return {PUBLISHED: {**zero_shot, **dict(zip(paper_results.SHOTS, paper_results.RN50[data_set], strict=True))}}
    if data_set == "imagenet" and clip in paper_results.IMAGENET_16_SHOT:
        return {PUBLISHED: {16: paper_results.IMAGENET_16_SHOT[clip]}}
    return {}


def _published_cascade(
    encoders: Mapping[str, VisionEncoderConfig], settings: Sequence[Mapping[str, Any]]
) -> dict[str, dict[int, float]]:
    """The paper's ImageNet rows of parts of the cascade, for the parts that some setting stands for."""
    parts = dict.fromkeys(_cascade_row(encoders, setting) for setting in settings)
    return {
        f"{part}, published": dict(zip(paper_results.CASCADE_SHOTS, paper_results.IMAGENET_CASCADE[part], strict=True))
        for part in parts
        if part and part != "all"
    }


def _papers_clip(encoders: Mapping[str, VisionEncoderConfig]) -> str:
    """The name of the CLIP, if the encoders are one of OpenAI's CLIPs and DINO's ResNet-50; else empty."""
    clips = {name for e in encoders.values() if (name := _openai_clip(e))}
    dinos = [
        e for e in encoders.values() if e.kind == "dino" and e.name in ("", "resnet50") and "random:" not in e.weights
    ]
    return clips.pop() if dinos and len(clips) == 1 and len(encoders) == 2 else ""


def _cascade_row(encoders: Mapping[str, VisionEncoderConfig], setting: Mapping[str, Any]) -> str:
    """The paper's name for the part of the cascade that a setting stands for; empty if the paper has no such part."""
    rule = table5(tuple(setting["encoders"]))[setting["ensemble"]]
    kinds = {encoders[name].kind for name in rule.sources or setting["encoders"]}
    # The paper's DINO cache has no text part; all other rows build on p_ZS.
    if rule.rule != "adaptive" or rule.baseline != (NOTHING if kinds == {"dino"} else ON_ZERO_SHOT):
        return ""
    return paper_results.cascade_row(
        clip="clip" in kinds,
        dino="dino" in kinds,
        generated=setting["generated"] > 0,
        sentences=setting["sentences"] == "file",
    )


def accuracy_table(rows: Sequence[Mapping[str, Any]], paper: Mapping[str, Mapping[int, float]]) -> ColumnsAndLines:
    """Columns and lines of a table, shots across and methods down; a cell is an `accuracy_cell` in percent.

    A method without shots has its accuracy in every column. The paper's rows follow, where they have one of our shots.

    Args:
        rows: {method, shots, accuracy, images} of one target, a row for each seed.
        paper: {row: {shots: percent}}.
    """
    shots = sorted({row["shots"] for row in rows if row["shots"] is not None})
    # Every method has cells at the most shots; with K = 0 only those that use generated images do.
    methods = dict.fromkeys(row["method"] for row in sorted(rows, key=_most_shots_first))
    lines = []
    for method in methods:
        of_method = [row for row in rows if row["method"] == method]
        lines.append([method, *(_cell([row for row in of_method if row["shots"] in (None, k)]) for k in shots)])
    for name, published in paper.items():
        if set(published) & set(shots):
            lines.append([name, *[f"{published[k]:.2f}" if k in published else "" for k in shots]])
    return ["method", *[f"{k} shots" if k != 1 else "1 shot" for k in shots]], lines


def _cell(rows: Sequence[Mapping[str, Any]]) -> str:
    return accuracy_cell([row["accuracy"] for row in rows], rows[0]["images"]) if rows else ""


def _most_shots_first(row: Mapping[str, Any]) -> float:
    return -math.inf if row["shots"] is None else -row["shots"]


def write_tables(folder: Path, tables: Mapping[str, ColumnsAndLines], others: Mapping[str, ColumnsAndLines]) -> None:
    """Write `table.md` with all tables, and a `table-TARGET.csv` for each target.

    Args:
        folder: where to write.
        tables: target → its accuracies.
        others: title → table that follows them in `table.md`.
    """
    sections = []
    for target, (columns, lines) in tables.items():
        sections.append(f"### {target}: test accuracy, %\n\n{markdown_table(columns, lines)}")
        write_csv(folder / f"table-{target}.csv", columns, lines)
    sections += [f"### {title}\n\n{markdown_table(columns, lines)}" for title, (columns, lines) in others.items()]
    write_text(folder / "table.md", "\n".join(sections))
