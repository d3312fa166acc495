"""The tables of a comparison's end, against sums by hand and scipy's interval."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.stats

from rayjobs.errors import DataError
from rayjobs.tune.adapter_finals import (
    FinalFigures,
    Finalist,
    describe_choice,
    differences,
    finals_table,
    method_comparison,
    read_final,
    write_comparison,
)
from rayjobs.tune.adapter_trial import AdapterTrialResult
from rayjobs.tune.search_space import Range

RESULT = AdapterTrialResult(
    setting="s",
    seed=0,
    run="seed0-a",
    trainable_parameters=1234,
    adapter_bytes=5000,
    peak_memory_bytes=3 * 10**9,
    tokens_per_s=500.0,
    val_loss=2.5,
)
FIGURES = FinalFigures(evaluated_on="x", test_loss=2.0, exact_match=50.0, rouge_l=60.0, answers=20, other_loss=3.0)


def finalist(value: str, losses: dict[int, float], seeds: int = 3) -> Finalist:
    results = [replace(RESULT, seed=seed, run=f"{value}-{seed}") for seed in losses]
    return Finalist(value, "base_lr 1", seeds, results, [replace(FIGURES, test_loss=loss) for loss in losses.values()])


def test_a_choice_at_the_end_of_what_was_tried_is_marked() -> None:
    axes = {"adapter.method": ["lora", "full"], "optimizer.base_lr": [0.1, 1.0, 10.0], "adapter.rank": [8]}
    axes |= {"zero.stage": Range(low=1, high=2), "base.dtype": ["bf16", "fp32"]}
    chosen = {"adapter.method": "lora", "optimizer.base_lr": 10.0, "adapter.rank": 8}
    assert describe_choice(chosen, axes, "adapter.method") == "base_lr 10 (edge), rank 8"
    chosen = {"optimizer.base_lr": 1.0, "zero.stage": 1.23456, "base.dtype": "bf16"}
    assert describe_choice(chosen, axes, "adapter.method") == "base_lr 1, stage 1.235, dtype bf16"


def test_the_table_has_the_base_and_each_value_and_says_what_diverged() -> None:
    base = replace(FIGURES, test_loss=4.0, exact_match=0.0)
    rows = finals_table("adapter.method", base, [finalist("lora", {0: 1.0, 1: 3.0}, 2), finalist("full", {1: 2.0})])
    assert [row["method"] for row in rows] == ["none", "lora", "full"]
    assert (rows[0]["test loss"], rows[0]["loss on other text"]) == ("4.000", "3.000")
    assert rows[1]["test loss"] == f"2.0 ± {statistics.stdev([1, 3]):.1f}"
    assert rows[1]["exact match, %"] == "50 [30, 70]"
    costs = [rows[1][name] for name in ("trainable parameters", "adapter", "peak memory", "tokens per s")]
    assert costs == ["1,234", "5.0 kB", "3.0 GB", "500"]
    assert rows[2]["setting"] == "base_lr 1, 2 of 3 seeds diverged"
    empty = finals_table("adapter.method", base, [finalist("ia3", {})])[1]
    assert empty == {"method": "ia3", "setting": "base_lr 1, 3 of 3 seeds diverged"}


def test_differences_are_paired_by_seed() -> None:
    first = finalist("zero_init", {0: 1.0, 1: 2.0, 2: 3.5})
    (row,) = differences("adapter.method", [first, finalist("lora", {0: 1.5, 2: 4.5, 7: 9.0})])
    low, high = scipy.stats.t.interval(0.95, 1, loc=0.75, scale=scipy.stats.sem([0.5, 1.0]))
    assert row["method, less zero_init"] == "lora"
    assert row["test loss"] == f"+0.8 [{low:+.1f}, {high:+.1f}]"
    assert row["loss on other text"] == "+0.00 [+0.00, +0.00]"
    assert differences("adapter.method", [first, finalist("lora", {})]) == []


def test_tables_are_written_one_after_the_other(tmp_path: Path) -> None:
    tables = [finals_table("m", FIGURES, [finalist("lora", {0: 1.0})]), []]
    write_comparison(tmp_path / "comparison.md", tables)
    text = (tmp_path / "comparison.md").read_text()
    assert text.startswith("| m | setting | trainable parameters | adapter | peak memory |")
    assert text.count("| --- |") == 1
    assert "Wilson's 95% interval" in text


def test_runs_have_the_parts_of_peft_s_method_comparison() -> None:
    settings = {name: {"of": name} for name in ("train", "optimizer", "data", "zero", "adapter", "base")}
    (run,) = method_comparison([finalist("lora", {1: 1.5})], {"lora-1": settings})
    assert run["run_info"]["experiment_name"] == "lora/base_lr 1/seed-1"
    assert run["run_info"]["peft_config"] == {"of": "adapter"}
    told = run["train_info"]
    assert (told["num_trainable_params"], told["file_size"], told["peak_memory"]) == (1234, 5000, 3 * 10**9)
    assert (told["test loss"], told["exact match"], told["other loss"]) == (1.5, 50.0, 3.0)
    assert run["meta_info"]["model_info"] == {"of": "base"}
    assert json.loads(json.dumps(run)) == run


def test_figures_are_read_as_written_and_damaged_ones_are_named(tmp_path: Path) -> None:
    assert read_final(tmp_path) is None
    FIGURES.write(tmp_path)
    assert read_final(tmp_path) == FIGURES
    (tmp_path / "final.json").write_text("{}")
    with pytest.raises(DataError, match=r"final\.json is not figures of the finals: .*remove this file"):
        read_final(tmp_path)
