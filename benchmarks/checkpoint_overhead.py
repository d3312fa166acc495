"""Time that checkpoints take from a training: one a second against none, in turns within one run.

    python -m benchmarks.checkpoint_overhead --workers 1 --steps 600 [--json]

A random LLaMA of 8 layers and width 512 is adapted with 1.2 million trained values, as many as on LLaMA 7B; with Adam's
moments a checkpoint has 15 MB. The workers are those of adapter-train. For `--turn` seconds a checkpoint
is saved each second, then for as long none, and so on; a step is counted from the end of the one before it, its reports
included. Each turn is compared with the mean of the two beside it, so that a machine that becomes slower or faster does
not count. The time in which a step waits for the copy of the state is also measured by itself.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapter.decoder_config import DecoderConfig
from benchmarks.zero3_memory import random_llama
from rayjobs.config import load
from rayjobs.job_configs.adapter_train import Config
from rayjobs.jobs import adapter_train
from rayjobs.train import trainer
from rayjobs.train.worker import Due, TrainingLoop, WorkerResult
from tests.sample_data import train_llama, write_instructions

SHAPE = DecoderConfig(
    dim=512, n_layers=8, n_heads=8, n_kv_heads=8, hidden_dim=1376, vocab_size=512, max_seq_len=512, norm_eps=1e-5
)
PROMPT_LENGTH = 300


class TakingTurns(TrainingLoop):
    """A training whose checkpoints are switched on and off, and whose times are written to a file."""

    def __init__(self, out: str, turn_s: float, **loop: Any) -> None:
        super().__init__(**loop)
        self.out, self.turn_s = out, turn_s
        self.began, self.times, self.copies = 0.0, list[tuple[int, float]](), list[float]()

    def run(self) -> int:
        """Train, and write the times."""
        steps = super().run()
        if self.rank == 0:
            Path(self.out).write_text(json.dumps({"times": self.times, "copies": self.copies}))
        return steps

    def due_after(self, step: int) -> Due:
        """As the settings say, in every second turn."""
        turn = self.turn()
        self.job = replace(self.job, train=replace(self.job.train, checkpoint_every_s=1.0 if turn % 2 else None))
        return super().due_after(step)

    def turn(self) -> int:
        """The number of the turn; the first step, in which much is made, is before all."""
        self.began = self.began or time.monotonic()
        return int((time.monotonic() - self.began) // self.turn_s)

    def end_step(self, due: Due) -> None:
        """Note the time of the step."""
        turn = self.turn()
        super().end_step(due)
        self.times.append((turn, time.monotonic() - self.step_began))

    def begin_checkpoint(self) -> None:
        """Note the time of the copy."""
        began = time.monotonic()
        super().begin_checkpoint()
        self.copies.append(time.monotonic() - began)


def settings(folder: Path, workers: int, steps: int) -> Config:
    """Settings of a run of so many steps."""
    random_llama(SHAPE, folder / "base")
    train_llama(folder / "tokens", steps=1)
    shutil.copy(folder / "tokens" / "tokenizer.model", folder / "base" / "tokenizer.model")
    write_instructions(folder / "records.json", 240)
    return load(
        Config,
        {
            "base": {"path": str(folder / "base"), "dtype": "fp32"},
            "data": {"path": [str(folder / "records.json")], "val_fraction": 0, "max_length": 256},
            "adapter": {"prompt_length": PROMPT_LENGTH},
            "train": {"epochs": steps / 60, "global_batch": 4, "checkpoint_every_s": None},
            "scale": {"workers": workers, "threads_per_worker": 1},
            "run": {"storage": str(folder / "runs"), "name": "turns"},
        },
    )


def measure(workers: int, steps: int, turn_s: float) -> dict[str, Any]:
    """Train; return the overhead in percent, and the milliseconds of a copy of the state and of a step."""
    with tempfile.TemporaryDirectory() as scratch:
        out = f"{scratch}/times.json"

        def worker(arguments: dict[str, Any]) -> WorkerResult:
            return WorkerResult(steps=TakingTurns(out, turn_s, **arguments).run())

        trainer.train_worker = worker
        adapter_train.run(settings(Path(scratch), workers, steps))
        noted = json.loads(Path(out).read_text())
    turns: dict[int, list[float]] = {}
    for turn, step_s in noted["times"][1:]:
        turns.setdefault(turn, []).append(step_s)
    means = [statistics.fmean(turns[turn]) for turn in sorted(turns)][:-1]  # the last turn was cut off
    saving = range(1, len(means) - 1, 2)
    ratios = [means[turn] / statistics.fmean((means[turn - 1], means[turn + 1])) for turn in saving]
    return {
        "workers": workers,
        "overhead_percent": round(100 * (statistics.median(ratios) - 1), 2),
        "of_turns_percent": [round(100 * (ratio - 1), 2) for ratio in ratios],
        "step_ms": round(1000 * statistics.median(means), 1),
        "copy_ms": round(1000 * statistics.median(noted["copies"]), 2),
        "checkpoints": len(noted["copies"]),
    }


def main() -> None:
    """Measure, and print a line for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    parser.add_argument("--turn", type=float, default=6, help="seconds of a turn (default: 6)")
    parser.add_argument("--steps", type=int, default=600, help="steps of the run (default: 600)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    rows = [measure(workers, args.steps, args.turn) for workers in args.workers]
    for row in rows:
        print(
            f"{row['workers']} workers: {row['overhead_percent']:+.2f}% (turns {row['of_turns_percent']}), a step of "
            f"{row['step_ms']} ms, {row['checkpoints']} copies of {row['copy_ms']} ms"
        )
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
