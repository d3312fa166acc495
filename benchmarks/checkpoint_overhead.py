"""Time that checkpoints take from a training: one a second against none, in turns within one run.

    python -m benchmarks.checkpoint_overhead --workers 1 2 --seconds 60

A random LLaMA of 8 layers and width 512 is adapted with 1.2 million trained values, as many as on LLaMA 7B; with Adam's
moments a checkpoint has 15 MB. What is due after a step is done by `rayjobs.train.worker.TrainingLoop`, with one thread
per worker and without Ray, whose reports are the same with and without checkpoints. For `--turn` seconds one is saved
each second, then for as long none, and so on. Each turn is compared with the mean of the two beside it, so that a
machine that becomes slower or faster does not count. Wall time counts what the writing thread takes from the training;
the processor time of the training thread, which other programs do not disturb, counts its own part.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray.train
import torch
import torch.distributed as dist

from adapter.decoder_config import DecoderConfig
from adapter.methods.registry import make_method
from benchmarks.zero3_memory import random_llama
from rayjobs.cluster.environment import set_environment
from rayjobs.train.checkpoint_writer import CheckpointWriter
from rayjobs.train.config import OptimizerConfig, TrainConfig, ZeroConfig
from rayjobs.train.engine import Engine, adapted_model
from rayjobs.train.metric_rows import MetricRows
from rayjobs.train.worker import Due, TrainingLoop

SHAPE = DecoderConfig(
    dim=512, n_layers=8, n_heads=8, n_kv_heads=8, hidden_dim=1376, vocab_size=512, max_seq_len=512, norm_eps=1e-5
)
PROMPT_LENGTH, TOKENS = 300, 128
SAVING, RESTING = TrainConfig(checkpoint_every_s=1), TrainConfig(checkpoint_every_s=None)


class Steps(TrainingLoop):
    """The steps of a worker, on the same tokens again and again, and the time of each."""

    def __init__(self, engine: Engine, storage: str) -> None:
        self.job: Any = SimpleNamespace(train=RESTING)
        self.engine, self.storage, self.rank = engine, storage, dist.get_rank()
        self.step, self.last_step, self.preemption = 0, 1 << 40, None
        self.rows, self.writer = MetricRows(), CheckpointWriter(storage)
        self.saved = self.reported = time.monotonic()
        self.copies = list[float]()

    def make(self, tokens: torch.Tensor) -> None:
        """Make one step, and what is due after it."""
        self.engine.backward(self.engine.loss(tokens, tokens) / TOKENS)
        due = torch.tensor(self.due_after(self.step + 1) if self.rank == 0 else (False, False), dtype=torch.float64)
        dist.all_reduce(due)
        self.engine.step(1e-3)
        self.step += 1
        self.rows.add({"step": self.step, "loss": 1.0})
        self.end_step(Due(*map(bool, due.tolist())))

    def begin_checkpoint(self) -> None:
        """Note the time of the copy, and keep one checkpoint."""
        began = time.perf_counter()
        super().begin_checkpoint()
        self.copies.append(time.perf_counter() - began)
        for old in sorted(Path(self.storage).glob("checkpoint_*"))[:-2] if self.rank == 0 else ():
            for file in old.iterdir():
                file.unlink()
            old.rmdir()


def worker(base: str, seconds: float, turn_s: float) -> None:
    """Train as one rank; rank 0 prints the turns and the copies as a line of JSON."""
    set_environment()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    setattr(ray.train, "report", lambda metrics, **_: None)  # noqa: B010  (no controller listens)
    setattr(ray.train, "get_preemption_info", lambda: None)  # noqa: B010
    zero, method = ZeroConfig(), make_method("zero_init", n_layers=SHAPE.n_layers, prompt_length=PROMPT_LENGTH)
    model = adapted_model(base, method, dtype="fp32", zero=zero, seed=0, device=torch.device("cpu"))
    steps = Steps(Engine(model, zero, OptimizerConfig()), f"{base}/checkpoints")
    tokens = torch.randint(3, 500, (1, TOKENS), generator=torch.Generator().manual_seed(dist.get_rank()))
    turns: list[tuple[float, float]] = []
    with steps.writer:
        for turn in range(round(seconds / turn_s)):
            steps.job.train = SAVING if turn % 2 else RESTING
            began, cpu, first = time.monotonic(), time.thread_time(), steps.step
            over = torch.zeros(1)
            while not over.item():
                steps.make(tokens)
                over[0] = time.monotonic() - began > turn_s
                dist.broadcast(over, 0)
            count = steps.step - first
            turns.append(((time.monotonic() - began) / count, (time.thread_time() - cpu) / count))
    if steps.rank == 0:
        print(json.dumps({"turns": turns, "copies": steps.copies}))


def overhead(step_s: list[float]) -> float:
    """Return by how many percent the steps of saving turns, the odd ones, take longer than of those beside them."""
    beside = ((step_s[turn - 1] + step_s[turn + 1]) / 2 for turn in range(1, len(step_s) - 1, 2))
    ratios = [now / other for now, other in zip(step_s[1:-1:2], beside, strict=True)]
    return 100 * (statistics.median(ratios) - 1)


def measure(base: Path, workers: int, seconds: float, turn_s: float) -> str:
    """Return a line about this number of workers."""
    module = ["-m", "benchmarks.checkpoint_overhead", "--base", str(base), "--seconds", str(seconds)]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={workers}", "--standalone", *module]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--turn", str(turn_s)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    made = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    wall, cpu = ([float(turn[which]) for turn in made["turns"]] for which in (0, 1))
    return (
        f"{workers} workers: {overhead(wall):+.2f}% wall time, {overhead(cpu):+.2f}% of the training thread; a step of "
        f"{1000 * statistics.median(wall):.1f} ms, {len(made['copies'])} copies of "
        f"{1000 * statistics.median(made['copies']):.1f} ms"
    )


def main() -> None:
    """Measure, and print a line for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=60, help="time of the steps (default: 60)")
    parser.add_argument("--turn", type=float, default=4, help="seconds of a turn (default: 4)")
    parser.add_argument("--base", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.base:
        worker(args.base, args.seconds, args.turn)
        return
    with tempfile.TemporaryDirectory() as folder:
        random_llama(SHAPE, Path(folder))
        for workers in args.workers:
            print(measure(Path(folder), workers, args.seconds, args.turn), flush=True)


if __name__ == "__main__":
    main()
