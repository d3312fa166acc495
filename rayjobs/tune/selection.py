"""The choice among a sweep's trials: by mean validation accuracy over seeds, never by anything else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayjobs.tune.search_space import Axis, Setting, Trial
from rayjobs.tune.trial import CACHE


def choose_settings(over: Sequence[tuple[Trial, dict[str, Any]]], compare: Sequence[Axis]) -> list[dict[str, Any]]:
    """For every K and value of the compared axes, the setting of the best mean over seeds; the earliest on ties.

    Only settings that finished at every seed are compared; a trial that was stopped early has no accuracy to compare.
    `finished` and `stopped` count the settings of either kind.
    """
    seeds = {trial.seed for trial, _ in over}
    cells: dict[str, dict[str, Any]] = {}
    settings: dict[str, dict[Setting, list[dict[str, Any]]]] = {}
    for trial, row in over:
        group = trial.setting.group(compare)
        key = repr((trial.shots, group))
        cells.setdefault(key, {"shots": trial.shots, "method": method(group), "group": group})
        settings.setdefault(key, {}).setdefault(trial.setting, []).append(row)
    chosen = []
    for key, cell in cells.items():
        stopped = sum(any(row["status"] == "stopped" for row in rows) for rows in settings[key].values())
        whole = {
            setting: rows
            for setting, rows in settings[key].items()
            if [row["status"] for row in rows] == ["finished"] * len(seeds)
        }
        # correct answers, not shares: the images are the same for all, and whole numbers do not round
        setting, best = max(whole.items(), key=lambda pair: sum(row["val_correct"] for row in pair[1]))
        mean = sum(row["val_accuracy"] for row in best) / len(best)
        rows = [
            {"seed": row["seed"], "trial": row["trial"], "val_accuracy": row["val_accuracy"]}
            | {"alpha": row["chosen_alpha"], "beta": row["chosen_beta"], "ensemble": row["chosen_ensemble"]}
            for row in best
        ]
        found = {"val_accuracy": mean, "finished": len(whole), "stopped": stopped, "seeds": rows}
        chosen.append({**cell, "setting": setting._asdict(), **found})
    return chosen


def method(group: dict[str, Any]) -> str:
    """What a row of the table is called: the compared axes' values, or CaFo itself."""
    told = [
        " + ".join(v) if isinstance(v, tuple | list) else v if axis in ("method", "ensemble") else f"{axis} {v}"
        for axis, v in group.items()
        if v != ""
    ]
    return ", ".join(told) or "CaFo"


def best_on_val(chosen: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The one that a headline tells of."""
    return max(chosen, key=lambda cell: cell["val_accuracy"])


def shown(chosen: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of which there are plots: the best, then every other method's choice at its largest K."""
    of_methods = {(best := best_on_val(chosen))["method"]: best}
    for cell in sorted(chosen, key=lambda cell: -cell["shots"]):
        of_methods.setdefault(cell["method"], cell)
    return list(of_methods.values())


def keep_chosen(folder: Path, chosen: list[dict[str, Any]]) -> None:
    """Leaves the caches of the chosen trials only: a thousand trials of ImageNet would be 200 GB."""
    kept = {seed["trial"] for cell in chosen for seed in cell["seeds"]}
    for cache in (folder / "trials").rglob(CACHE):
        if cache.parent.name not in kept:
            cache.unlink(missing_ok=True)
