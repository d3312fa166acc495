"""Peak private memory of a worker under ZeRO-3 against the number of workers, loading included.

    python benchmarks/zero3_memory.py --workers 1 2 4 --json

A random LLaMA is written to a temporary folder. 1, 2, ... processes on this machine load it as workers of Ray Train do
and make training steps. Counted is anonymous and shared memory (RssAnon, RssShmem), sampled every few milliseconds,
above what the process holds before it opens the checkpoint. Pages of the mapped file are not counted, since the kernel
can drop them. glibc is told to return the memory of freed tensors at once, so that fragmentation is not counted.

Each worker must hold `weights / N`. In addition it needs the largest tensor while that is being partitioned and, in
training, the layers that are gathered.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from adapter.adaption import AdaptionConfig
from adapter.base.checkpoint import save_decoder
from adapter.decoder import Decoder
from adapter.decoder_config import DecoderConfig
from rayjobs.train.config import OptimizerConfig, ZeroConfig
from rayjobs.train.engine import Engine, adapted_model

MB = 1e6
TOKENS = 128


class Peak:
    """Measures the most private memory, in bytes, that this process holds within a `with` block."""

    def __enter__(self) -> "Peak":
        self.bytes, self.over = private_memory(), threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.over.wait(0.002):
            self.bytes = max(self.bytes, private_memory())


def private_memory() -> int:
    """Return this process's anonymous and shared memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def worker(base: str, steps: int) -> None:
    """Load and train as one rank; rank 0 prints the largest peaks of all, in MB, as a line of JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    zero, adaption = ZeroConfig(stage=3), AdaptionConfig(n_layers=4, prompt_length=10)
    import deepspeed  # noqa: F401  (every worker holds it, so that it is loaded before the measurement)

    before = private_memory()
    with Peak() as loading:
        model = adapted_model(base, adaption, dtype="bf16", zero=zero, seed=0, device=torch.device("cpu"))
    after = private_memory()
    with Peak() as training:
        engine = Engine(model, zero, OptimizerConfig())
        tokens = torch.randint(3, 1000, (1, TOKENS), generator=torch.Generator().manual_seed(dist.get_rank()))
        for _ in range(steps):
            engine.backward(engine.loss(tokens, tokens) / TOKENS)
            engine.step(1e-3)
    peaks = {
        "before": before / MB,
        "loading": (loading.bytes - before) / MB,
        "loaded": (after - before) / MB,
        "training": (training.bytes - before) / MB,
    }
    all_peaks: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(all_peaks, peaks)
    if dist.get_rank() == 0:
        print(json.dumps({name: round(max(one[name] for one in all_peaks), 1) for name in peaks}))


def measure(base: Path, workers: int, steps: int) -> dict[str, float]:
    """Return the largest peaks of any worker, in MB, with this number of workers."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={workers}", "--standalone", __file__]
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": root, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    started = time.monotonic()
    done = subprocess.run(
        [*command, "--base", base, "--steps", str(steps)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    peaks = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return {"workers": workers, **peaks, "seconds": round(time.monotonic() - started, 1)}


def random_llama(shape: DecoderConfig, folder: Path) -> None:
    with torch.device("meta"):
        model = Decoder(shape)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() == 2 else torch.nn.init.ones_(parameter)
    save_decoder(model, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="numbers of workers (default: 1 2 4)")
    parser.add_argument("--dim", type=int, default=2048, help="width of the model (default: 2048)")
    parser.add_argument("--layers", type=int, default=16, help="layers of the model (default: 16)")
    parser.add_argument("--steps", type=int, default=2, help="training steps (default: 2)")
    parser.add_argument("--base", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    if args.base:
        return worker(args.base, args.steps)

    hidden, vocabulary = args.dim * 43 // 16, 32_000
    shape = DecoderConfig(
        dim=args.dim, n_layers=args.layers, n_heads=16, n_kv_heads=16, hidden_dim=hidden, vocab_size=vocabulary
    )
    layer = 4 * args.dim**2 + 3 * args.dim * hidden
    weights = 2 * (args.layers * layer + 2 * vocabulary * args.dim) / MB
    largest = 2 * max(layer, vocabulary * args.dim) / MB
    print(f"weights {weights:.0f} MB, largest {largest:.0f} MB")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        random_llama(shape, Path(folder))
        for workers in args.workers:
            row = measure(Path(folder), workers, args.steps)
            rows.append({**row, "weights_per_worker": round(weights / workers, 1)})
            peaks = ", ".join(f"{name} {row[name]:.0f}" for name in ("loading", "loaded", "training"))
            print(f"{workers} workers: weights / N {weights / workers:.0f} MB, {peaks} MB, {row['seconds']:.0f} s")
    if args.json:
        print(json.dumps({"weights": round(weights, 1), "largest": round(largest, 1), "rows": rows}))
    return None


if __name__ == "__main__":
    main()
