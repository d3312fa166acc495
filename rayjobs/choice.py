"""The choice among a sweep's trials: by mean validation accuracy over seeds, never by anything else."""

from collections.abc import Sequence
from typing import Any

from rayjobs.space import Axis, Setting, Trial


def choose(trials: Sequence[Trial], rows: Sequence[dict[str, Any]], compare: Sequence[Axis]) -> list[dict[str, Any]]:
    """For every K and value of the compared axes, the setting of the best mean over seeds; the earliest on ties."""
    cells: dict[str, dict[str, Any]] = {}
    settings: dict[str, dict[Setting, list[dict[str, Any]]]] = {}
    for trial, row in zip(trials, rows, strict=True):
        group = trial.setting.group(compare)
        key = repr((trial.shots, group))
        cells.setdefault(key, {"shots": trial.shots, "method": method(group), "group": group})
        settings.setdefault(key, {}).setdefault(trial.setting, []).append(row)
    chosen = []
    for key, cell in cells.items():
        # correct answers, not shares: the images are the same for all, and whole numbers do not round
        setting, best = max(settings[key].items(), key=lambda pair: sum(row["val_correct"] for row in pair[1]))
        mean = sum(row["val_accuracy"] for row in best) / len(best)
        seeds = [
            {"seed": row["seed"], "trial": row["trial"], "val_accuracy": row["val_accuracy"]}
            | {"alpha": row["chosen_alpha"], "beta": row["chosen_beta"], "ensemble": row["chosen_ensemble"]}
            for row in best
        ]
        chosen.append({**cell, "setting": setting._asdict(), "val_accuracy": mean, "seeds": seeds})
    return chosen


def method(group: dict[str, Any]) -> str:
    """What a row of the table is called: the compared axes' values, or CaFo itself."""
    told = [
        " + ".join(v) if isinstance(v, tuple | list) else v if axis == "ensemble" else f"{axis} {v}"
        for axis, v in group.items()
    ]
    return ", ".join(told) or "CaFo"
