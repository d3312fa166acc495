"""Tables of what a sweep has chosen: accuracies on the images of the choices, estimates, and what each part adds."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rayjobs.reporting.accuracy_tables import accuracy_table
from rayjobs.tune.search_space import Trial
from rayjobs.tune.selection import ChosenSetting
from rayjobs.tune.trial import TrialResult


def choice_tables(
    results: Sequence[tuple[Trial, TrialResult]], chosen: Sequence[ChosenSetting]
) -> dict[str, list[dict[str, str]]]:
    """The tables by title, each a list of rows; a table without rows is left out."""
    on_val = all(choice.select == "val" for choice in chosen)
    images = {result.trial: result.images for _, result in results}
    rows = [
        {"method": choice.method, "shots": choice.shots, "accuracy": seed.accuracy, "images": images.get(seed.trial)}
        for choice in chosen
        for seed in choice.seeds
        if seed.accuracy is not None
    ]
    columns, lines = accuracy_table(rows, {}) if rows else ([], [])
    tables = {
        f"chosen: accuracy on {'val' if on_val else 'the images of the choice'}, %": [
            dict(zip(columns, line, strict=True)) for line in lines
        ],
        "estimated accuracy on new images, %": list(_estimates(chosen)),
        "parts: images correct on the images of the choice, mean over seeds": list(_parts(results, chosen)),
    }
    return {title: table for title, table in tables.items() if table}


def _estimates(chosen: Sequence[ChosenSetting]) -> Iterator[dict[str, str]]:
    for choice in chosen:
        if (estimate := choice.estimate()) is not None:
            low, high = estimate.interval
            yield {
                "method": choice.method,
                "shots": str(choice.shots),
                "estimate": f"{100 * estimate.accuracy:.1f}",
                "95% interval": f"{100 * low:.1f} to {100 * high:.1f}",
                "held-out images": f"{estimate.total:.0f}",
            }


def _parts(results: Sequence[tuple[Trial, TrialResult]], chosen: Sequence[ChosenSetting]) -> Iterator[dict[str, str]]:
    """A row for each part of each chosen cascade that has a choice about it."""
    for choice in chosen:
        for name, values in _part_counts(results, choice).items():
            if None in values["without"]:
                continue
            mean = {key: sum(numbers) / len(numbers) for key, numbers in values.items() if None not in numbers}
            gain = mean["with_it"] - mean["without"]
            yield {
                "method": choice.method,
                "shots": str(choice.shots),
                "part": name,
                "alone": f"{mean['alone']:.1f}" if "alone" in mean else "",
                "best without": f"{mean['without']:.1f}",
                "best with": f"{mean['with_it']:.1f}",
                "verdict": "helps" if gain > 0 else "hurts" if gain < 0 else "adds nothing",
            }


def _part_counts(
    results: Sequence[tuple[Trial, TrialResult]], choice: ChosenSetting
) -> dict[str, dict[str, list[Any]]]:
    """The counts of each part of a choice, by seed: {part: {count: values}}."""
    trials = {seed.trial for seed in choice.seeds}
    found: dict[str, dict[str, list[Any]]] = {}
    for _, result in results:
        if result.trial in trials and result.parts:
            for part in json.loads(result.parts):
                counts = found.setdefault(part.pop("name"), {})
                for key, count in part.items():
                    counts.setdefault(key, []).append(count)
    return found


def hurtful_notices(results: Sequence[tuple[Trial, TrialResult]], chosen: Sequence[ChosenSetting]) -> Iterator[str]:
    """A sentence for each part without which more images are correct, with the choices where this is so."""
    choices: dict[str, dict[str, list[str]]] = {}
    for choice in chosen:
        for name, values in _part_counts(results, choice).items():
            if None not in values["without"] and sum(values["with_it"]) < sum(values["without"]):
                choices.setdefault(name, {}).setdefault(choice.method, []).append(str(choice.shots))
    for name, shots in choices.items():
        places = "; ".join(f"{method} at K={', '.join(numbers)}" for method, numbers in shots.items())
        yield f"on the images of the choice, more are correct without {name}: {places}"
