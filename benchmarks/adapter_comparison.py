"""Every adapter method on a real model, SmolLM2-135M-Instruct: a task with exact answers, and what training forgets.

    python -m benchmarks.adapter_comparison --alpaca alpaca_data.json [--methods lora v2] [--out runs/comparison]

This is `adapter-tune` with `sweep.finals`: it writes the records and runs the job. `comparison.md` has the tables.
The task is that of `rayjobs demo`: short questions, whose answers are JSON with the answer and the number of its words.
Each method is trained at each of three learning rates, about three times apart; the rate with the lowest loss on
held-out training questions is trained with three seeds. These adapters answer test questions about other subjects and
of other kinds, greedily. The other text is Alpaca's, none of which is trained. All methods have the same records, the
same order, as many steps and one schedule. `full` trains weights in float32, because it cannot train 16 bits; the
others' base is in bf16. The same command goes on where it was stopped.
"""

import argparse
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayjobs.config import load
from rayjobs.demo import json_answers
from rayjobs.jobs import adapter_tune
from rayjobs.storage.files import write_json
from tests.real_models import smollm2

BATCH = 8
PEAK_RATES: Mapping[str, tuple[float, ...]] = {
    "zero_init": (0.006, 0.02, 0.06),
    "prefix": (0.06, 0.2, 0.6),
    "v2": (0.001, 0.003, 0.01),
    "lora": (0.002, 0.006, 0.02),
    "bias": (0.003, 0.01, 0.03),
    "ia3": (0.01, 0.03, 0.1),
    "full": (0.00003, 0.0001, 0.0003),
}
"""Peak learning rates of each method."""
TRAIN, HELD_OUT, TEST, ALPACA = 200, 32, 60, 32
"""Records to train on, to choose the rate by, of the test, and of the other text."""


def write_records(folder: Path, alpaca: Path) -> dict[str, str]:
    """Write the records of each part as a JSON file; return their paths."""
    records = json_answers.training_records(TRAIN + HELD_OUT, 0)
    other = json.loads(alpaca.read_text(encoding="utf-8"))
    random.Random(0).shuffle(other)
    parts = {
        "held_out": records[:HELD_OUT],
        "train": records[HELD_OUT:],
        "test": [record for of_kind in json_answers.held_out_records(TEST, 0).values() for record in of_kind],
        "other": other[:ALPACA],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        write_json(folder / f"{name}.json", part)
    return {name: str(folder / f"{name}.json") for name in parts}


def search_space(method: str) -> dict[str, list[Any]]:
    """Return a method's own axes: its rates, the precision of the base, and the layers of prompts, all but two."""
    space: dict[str, list[Any]] = {"optimizer.base_lr": [rate * 256 / BATCH for rate in PEAK_RATES[method]]}
    if method == "full":
        space["base.dtype"] = ["fp32"]
    if method in ("zero_init", "prefix", "v2"):
        space["adapter.n_layers"] = [28]
    return space


def settings(given: argparse.Namespace) -> adapter_tune.Config:
    """The settings of the sweep."""
    paths = write_records(given.out / "records", given.alpaca)
    sweep = {
        "axes": {
            "adapter.method": given.methods,
            "optimizer.base_lr": [1.0],
            "base.dtype": ["bf16"],
            "adapter.n_layers": [None],
        },
        "axes_of": {method: search_space(method) for method in given.methods},
        "compare": "adapter.method",
        "seeds": given.seeds[:1],
        "at_once": 2,
        "finals": {
            "test": {"path": paths["test"]},
            "other": {"path": paths["other"]},
            "seeds": given.seeds,
            "max_length": 320,
            "max_new_tokens": 32,
        },
    }
    return load(
        adapter_tune.Config,
        {
            "base": {"path": str(smollm2())},
            "data": {
                "path": [paths["train"]],
                "val_path": [paths["held_out"]],
                "template": "chat",
                "max_length": 128,
            },
            "adapter": {"prompt_length": 10, "rank": 8},
            "train": {"epochs": 1, "warmup_epochs": 0.1, "global_batch": BATCH, "token_budget": 1024},
            "optimizer": {"clip_norm": 1.0},
            "scale": {"workers": 1, "threads_per_worker": 1},
            "zero": {"stage": 0},
            "sweep": sweep,
            "run": {"name": "sweep", "storage": str(given.out)},
        },
    )


def main() -> None:
    """Run the sweep, and print its comparison."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.adapter_comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--alpaca", type=Path, required=True, help="file of Alpaca's records")
    parser.add_argument("--methods", nargs="+", choices=list(PEAK_RATES), default=list(PEAK_RATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"), help="folder of records and results")
    given = parser.parse_args()
    if not given.alpaca.is_file():
        parser.error(f"--alpaca: there is no file {given.alpaca}")
    chosen = settings(given)
    adapter_tune.run(chosen)
    print((chosen.run.folder / "comparison.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
