"""The best setting of a sweep over adapter-train's settings, and its table."""

from dataclasses import replace
from pathlib import Path

import pytest

from rayjobs.errors import DataError
from rayjobs.reporting.figures import read_figures
from rayjobs.tune.adapter_sweep import best_setting, compare_values, plot_settings, summarize, write_table
from rayjobs.tune.adapter_trial import AdapterTrialResult, comparison_metric, outcome, read_adapter_result
from rayjobs.tune.search_space import Range

RESULT = AdapterTrialResult(
    setting="n_layers 1",
    seed=0,
    run="seed0-a",
    trainable_parameters=1234,
    first_loss=3.0,
    peak_loss=4.0,
    final_loss=2.0,
    val_loss=2.5,
    evaluated_on=None,
)


def test_settings_are_compared_by_accuracy_then_validation_loss_then_training_loss() -> None:
    without_val = replace(RESULT, val_loss=None)
    measured = replace(RESULT, accuracy=50.0)
    names = [comparison_metric([result]).name for result in (measured, RESULT, without_val)]
    assert names == ["accuracy", "val_loss", "final_loss"]


def test_the_best_setting_has_the_best_mean_over_seeds_and_is_the_first_on_ties() -> None:
    losses = [("n_layers 1", 2.0), ("n_layers 1", 4.0), ("n_layers 2", 3.5), ("n_layers 2", 2.5), ("n_layers 3", 3.1)]
    results = [replace(RESULT, setting=setting, val_loss=loss) for setting, loss in losses]
    assert best_setting(results) == ("n_layers 1", "n_layers 1, val loss 3.0 ± 1.4")
    accurate = [replace(result, accuracy=10.0 * i) for i, result in enumerate(results)]
    assert best_setting(accurate) == ("n_layers 3", "n_layers 3, accuracy 40.00")


def test_a_result_is_read_as_it_was_written_and_leaves_out_an_accuracy_that_was_not_measured(tmp_path: Path) -> None:
    RESULT.write(tmp_path)
    assert '"accuracy"' not in (tmp_path / "trial.json").read_text()
    assert read_adapter_result(tmp_path) == RESULT
    assert read_adapter_result(tmp_path / "nowhere") is None


def test_the_table_has_a_row_for_each_setting(tmp_path: Path) -> None:
    summary = summarize([RESULT, replace(RESULT, seed=1, val_loss=3.5), replace(RESULT, setting="n_layers 2")])
    write_table(tmp_path / "table.md", summary["settings"])
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "| setting | trainable parameters | first loss | peak loss | final loss | val loss |"
    assert lines[2].startswith("| n_layers 1 | 1,234 | 3.0000 ± 0.0000 |")
    assert len(lines) == 4


def test_values_are_compared_each_at_its_best_setting() -> None:
    losses = {
        ("lora", 0.1): (3.0, 2.0),
        ("lora", 1.0): (2.4, 2.2),
        ("bias", 0.1): (9.0, 8.0),
        ("bias", 1.0): (9.0, 9.0),
    }
    results, values = [], {}
    for (method, rate), of_seeds in losses.items():
        values[setting := f"method {method}, base_lr {rate}"] = method
        results += [
            replace(RESULT, setting=setting, seed=seed, val_loss=loss, adapter_bytes=2048, tokens_per_s=7.0)
            for seed, loss in enumerate(of_seeds)
        ]
    rows = compare_values(results, values)
    assert [row["setting"] for row in rows] == ["method lora, base_lr 1.0", "method bias, base_lr 0.1"]
    assert (rows[0]["val loss"], rows[0]["adapter"], rows[0]["tokens per s"]) == ("2.30 ± 0.14", "2.0 kB", "7 ± 0")


def test_a_setting_with_a_trial_that_was_stopped_or_diverged_is_not_chosen_and_is_told(
    tmp_path: Path,
) -> None:
    stopped = replace(RESULT, setting="b", status="stopped", steps=40, val_loss=None, trainable_parameters=None)
    half = [
        replace(RESULT, setting="c", val_loss=0.1),
        replace(RESULT, setting="c", seed=1, status="diverged", steps=7),
    ]
    summary = summarize([stopped, *half, RESULT])
    assert (summary["best"], summary["stopped_trials"], summary["diverged_trials"]) == ("n_layers 1", 1, 1)
    write_table(tmp_path / "table.md", summary["settings"])
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0].startswith("| setting | status | trainable parameters | first loss |")
    assert [line.split(" | ")[1] for line in lines[2:]] == [
        "stopped at step 40",
        "finished, diverged at step 7",
        "finished",
    ]
    with pytest.raises(DataError, match=r"lower the values of optimizer\.base_lr"):
        best_setting([stopped, *half])
    assert [row["setting"] for row in compare_values([stopped, RESULT], {"b": "b", "n_layers 1": "a"})] == [
        "n_layers 1"
    ]


def test_a_search_minimizes_the_mean_held_out_loss_or_maximizes_the_accuracy() -> None:
    seeds = [replace(RESULT, val_loss=loss, steps=10, seconds=2.0) for loss in (2.0, 4.0)]
    first = replace(seeds[0], val_steps=[5, 10], val_losses=[3.0, 2.0])
    assert outcome([first, seeds[1]]) == {"objective": 3.0, "curve": [[5, 3.0], [10, 2.0]], "steps": 20, "seconds": 4.0}
    assert outcome([replace(result, accuracy=40.0) for result in seeds])["objective"] == -40.0
    assert outcome([replace(first, status="stopped")])["objective"] is None


def test_settings_and_importances_are_plotted_and_few_settings_are_called_few(tmp_path: Path) -> None:
    axes = {"optimizer.base_lr": Range(low=0.01, high=1.0), "adapter.targets": [["wq"], ["wq", "wv"]]}
    rates = [0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0]
    settings = [
        (
            {"optimizer.base_lr": rate, "adapter.targets": axes["adapter.targets"][i % 2]},
            [replace(RESULT, val_loss=rate)],
        )
        for i, rate in enumerate(rates)
    ]
    settings[3][1][0] = replace(RESULT, status="stopped", val_loss=None)
    plot_settings(tmp_path, axes, settings)
    shown, importance = read_figures(tmp_path)
    assert shown.caption == (
        "Each line is one of 8 settings, through its values and its val loss; the best one is red. "
        "The 1 dotted ones were stopped or diverged."
    )
    assert importance.caption.endswith("7 settings are few for 2 hyperparameters: take it as a hint.")
    drawing = (tmp_path / "settings.svg").read_text()
    assert all(f">{name}<" in drawing for name in ("base_lr", "targets", "val loss", "0.01"))
