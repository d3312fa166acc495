"""Measure what one GPU gives, in one command of under 8 minutes, and print it as JSON.

    python -m benchmarks.gpu [--data alpaca_data.json --tokenizer tokenizer.model] [--out gpu.json]
    python -m benchmarks.gpu --shape tiny --device cpu

The second line runs every part at a tiny size on any machine, to see that it works. Nothing else than the environment
is needed: weights are random and are made on the device, and without --data so are the records
(`benchmarks.gpu_training.make_records` states their lengths).

    machine   bf16 matrix products and memory bandwidth as measured here: what all others are compared with
    train     LLaMA-7B's shape in bf16, adapted as in the paper: speed, memory, the share of the measured peak, the time
              that our DeepSpeed engine adds to a plain loop, and the time of the paper's 52,002 records x 5 epochs
    nf4       the same with a base in 4 bits, in a plain loop
    decode    generation with the adapter at batch 1 and 64, as a share of the floor, the time in which the measured
              bandwidth reads all weights once
    encode    images/s of CLIP's ViT-B/16 in float32 and bf16
    search    the exact choice of α and β for 1,000 classes x 24 keys and 10,000 images, against its products alone
    tests     `pytest -m gpu`

Each part is a process with a limit of time. One that fails or takes too long is recorded with its error, and the others
go on. --out is written after every part, so that nothing is lost if the machine is taken away.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MINUTES = 7.5
STEPS = 6
"""Batches of records that a part trains on."""
TAIL = 2000
"""Characters of a failed part's output that are kept."""

Results = dict[str, dict[str, Any]]


def parts(given: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the parts by name, in the order in which they run."""
    from benchmarks import gpu_parts as measure
    from benchmarks import gpu_training as training
    from benchmarks.gpu_setup import SIZES

    sizes, device = SIZES[given.shape], given.device

    def train(precision: str) -> dict[str, Any]:
        records = training.make_records(sizes, STEPS * sizes.batch, given.data, given.tokenizer)
        return training.train(sizes, device, precision, records, with_zero=precision == "bf16")

    return {
        "machine": lambda: measure.machine(sizes, device),
        "train": lambda: train("bf16"),
        "nf4": lambda: train("nf4"),
        "decode": lambda: measure.decode(sizes, device),
        "encode": lambda: measure.encode(sizes, device),
        "search": lambda: measure.search(sizes, device),
        "tests": run_tests,
    }


LIMITS_S = {"machine": 60, "train": 180, "nf4": 120, "decode": 120, "encode": 60, "search": 90, "tests": 90}
"""The longest that each part may take."""


def run_tests() -> dict[str, Any]:
    """Run the tests that need a GPU; return how they ended."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    lines = done.stdout.strip().splitlines()
    return {"exit_code": done.returncode, "summary": lines[-1] if lines else done.stderr[-TAIL:]}


def run_part(name: str, given: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """Run a part in a process of its own; return its figures, or its error."""
    words = ["--shape", given.shape, "--device", given.device, "--part", name]
    for option in ("data", "tokenizer"):
        words += [f"--{option}", getattr(given, option)] if getattr(given, option) else []
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu", *words], capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {limit_s:.0f} s"}
    taken = {"part_s": round(time.monotonic() - start, 1)}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": f"exit code {done.returncode}", "output": (done.stdout + done.stderr)[-TAIL:], **taken}
    return {**json.loads(lines[-1]), **taken}


def compare(results: Results) -> Results:
    """Return the results with each part's share of what the machine was measured to give."""
    machine, shares = results.get("machine", {}), {name: dict(part) for name, part in results.items()}
    peak, bandwidth = machine.get("flops_per_s"), machine.get("read_bytes_per_s")
    if not peak or not bandwidth:
        return shares
    for part in [*shares.values(), *(shares.get("encode", {}).get(name, {}) for name in ("fp32", "bf16"))]:
        if "flops_per_s" in part and part is not shares["machine"]:
            part["share_of_peak"] = part["flops_per_s"] / peak
    decoding = shares.get("decode", {})
    for name, one in decoding.items():
        if name.startswith("batch_"):
            batch = int(name.removeprefix("batch_"))
            one["share_of_floor"] = one["tokens_per_s"] / batch * decoding["bytes_per_step"] / bandwidth
    return shares


def rounded(value: Any) -> Any:
    """Return figures with four digits."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("7b", "tiny"), default="7b", help="size of everything (default: 7b)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--data", help="instruction records, for their lengths: JSON, JSONL or Parquet")
    parser.add_argument("--tokenizer", help="a tokenizer of at most 32,000 tokens, for --data")
    parser.add_argument("--out", type=Path, help="also write the JSON into this file, after every part")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all parts (default: {MINUTES:g})")
    parser.add_argument("--only", nargs="+", choices=LIMITS_S, default=list(LIMITS_S), help="run these parts only")
    parser.add_argument("--part", choices=LIMITS_S, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.data and not given.tokenizer:
        parser.error("--data needs --tokenizer")
    return given


def main() -> None:
    given = parse_arguments()
    if given.part:
        print(json.dumps(parts(given)[given.part]()))
        return
    end, results = time.monotonic() + 60 * given.minutes, Results()
    for name in given.only:
        left = end - time.monotonic()
        results[name] = run_part(name, given, min(LIMITS_S[name], left)) if left > 5 else {"error": "no time was left"}
        print(f"{name}: {results[name].get('error', 'done')}", file=sys.stderr, flush=True)
        if given.out:
            given.out.write_text(json.dumps(rounded(compare(results)), indent=1))
    print(json.dumps(rounded(compare(results))))


if __name__ == "__main__":
    main()
