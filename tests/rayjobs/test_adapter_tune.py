"""adapter-tune: ordinary training runs side by side, taken up again, and tabled by setting."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rayjobs.config import ConfigError, load
from rayjobs.jobs import adapter_tune


def settings(tiny_base: Path, records: Path, storage: Path, **sweep: object) -> adapter_tune.Config:
    return load(
        adapter_tune.Config,
        {
            "base": {"path": str(tiny_base)},
            "data": {"path": [str(records)], "max_length": 200, "val_fraction": 0.2},
            "adapter": {"n_layers": 2, "prompt_length": 3},
            "train": {"epochs": 1, "warmup_epochs": 0, "global_batch": 16},
            "optimizer": {"base_lr": 1.0},
            "sweep": {"axes": {"adapter.attention": ["zero-init", "prefix"]}, **sweep},
            "run": {"name": "sweep", "storage": str(storage)},
        },
    )


def test_grids_and_single_axes(tiny_base: Path, records: Path, tmp_path: Path) -> None:
    axes = {"adapter.n_layers": [1, 2], "optimizer.base_lr": [0.1, 1.0, 2.0]}
    assert len(adapter_tune.check(settings(tiny_base, records, tmp_path, axes=axes, seeds=[0, 1]))) == 12
    each = settings(tiny_base, records, tmp_path, axes=axes, method="each")
    assert adapter_tune.points(each.sweep)[2:] == [{"optimizer.base_lr": rate} for rate in (0.1, 1.0, 2.0)]
    names = {adapter_tune.training(each, trial).run.name for trial in adapter_tune.check(each)}
    assert len(names) == 5
    assert adapter_tune.training(each, ({"adapter.n_layers": 1}, 7)).train.seed == 7
    with pytest.raises(ConfigError, match=r"adapter.layers: unknown key; did you mean adapter.n_layers"):
        adapter_tune.check(settings(tiny_base, records, tmp_path, axes={"adapter.layers": [1]}))


@pytest.mark.ray
def test_trials_run_side_by_side_and_are_not_run_again(
    cluster: None, tiny_base: Path, records: Path, tmp_path: Path
) -> None:
    config = settings(tiny_base, records, tmp_path, at_once=2)
    result = adapter_tune.run(config)
    assert [row["setting"] for row in result["settings"]] == ["attention zero-init", "attention prefix"]
    rows = pq.read_table(config.run.folder / "results.parquet").to_pylist()
    assert [row["trainable_parameters"] for row in rows] == [2 * (3 * 24 + 6), 2 * 3 * 24]
    for row in rows:
        trial = config.run.folder / "trials" / row["run"]
        losses = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in losses if "loss" in line]
        assert (row["first_loss"], row["peak_loss"]) == (losses[0], max(losses))
        assert (trial / "adapter.safetensors").exists()
    assert rows[0]["first_loss"] != rows[1]["first_loss"], "a prefix changes the base from the first step"
    assert {"curves.html", "first_steps.png", "table.md", "report.html"} <= {
        p.name for p in config.run.folder.iterdir()
    }
    shutil.rmtree(config.run.folder / "trials" / rows[0]["run"] / "train")  # it would have to be trained again
    assert adapter_tune.run(config) == result
