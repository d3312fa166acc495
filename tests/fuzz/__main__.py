"""Try readers on many damaged inputs, each target in a process of its own: `python -m tests.fuzz 100000`.

Inputs that a reader fails on are kept under `build/fuzz/`, each as the damaged file, with the reason beside it;
`--again FILE` reads one of them. The numbers of the inputs make them the same on every machine.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fuzz.target import Bench, Target

KEPT = Path("build/fuzz")
HANGS_SECONDS = 60
"""Time after which an input that still runs ends its process."""
COLUMNS = ("inputs", "refused", "accepted", "failures", "slowest_ms")


def find_targets() -> dict[str, Target]:
    from tests.fuzz import adapter_targets, cafo_targets, rayjobs_targets

    every = (*adapter_targets.TARGETS, *cafo_targets.TARGETS, *rayjobs_targets.TARGETS)
    return {target.name: target for target in every}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", type=int, nargs="?", default=100_000, help="inputs of all targets together")
    parser.add_argument("--target", action="append", help="a target; several times for several; all by default")
    parser.add_argument("--seed", default="0", help="another text makes other inputs")
    parser.add_argument("--again", type=Path, help="read a kept input")
    parser.add_argument("--only", metavar="RANGE", help=argparse.SUPPRESS)  # START:STOP, in a process of its own
    options = parser.parse_args(arguments)
    targets = find_targets()
    if options.again:
        return read_again(targets, options.again)
    if options.only:
        start, stop = map(int, options.only.split(":"))
        return run_range(targets[options.target[0]], options.seed, start, stop)
    chosen = [targets[name] for name in options.target or targets]
    total = sum(target.share for target in chosen)
    failures, rows = 0, []
    print(f"{'target':24} {'inputs':>8} {'refused':>8} {'accepted':>8} {'failures':>8} {'slowest':>11}", flush=True)
    for target in chosen:
        row = run_target(target, options.seed, max(1, options.inputs * target.share // total))
        rows.append(row)
        show(target.name, row)
        failures += row["failures"]
    show("all", {key: (max if key == "slowest_ms" else sum)(row[key] for row in rows) for key in COLUMNS})
    if failures:
        print(f"the inputs that failed are under {KEPT}", file=sys.stderr)
    return int(bool(failures))


def show(name: str, row: dict[str, int]) -> None:
    *counts, slowest = (row[key] for key in COLUMNS)
    print(f"{name:24} {' '.join(f'{count:8,}' for count in counts)} {slowest:8,} ms", flush=True)


def run_target(target: Target, seed: str, count: int) -> dict[str, int]:
    """Run a target's inputs in processes of their own, a new one after each that a reader has ended."""
    row, start = dict.fromkeys(COLUMNS, 0), 0
    while start < count:
        command = [
            sys.executable,
            "-m",
            "tests.fuzz",
            "--target",
            target.name,
            "--seed",
            seed,
            "--only",
            f"{start}:{count}",
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        report = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {"next": start + 1, "inputs": 1}
        if done.returncode:
            ended = report["next"]
            keep(target.name, ended, f"the process ended with {done.returncode}\n", *damaged(target, seed, ended))
            row["failures"] += 1
            report = {**report, "next": ended + 1, "inputs": report["inputs"] + 1}
        for key in COLUMNS:
            row[key] = max(row[key], report.get(key, 0)) if key == "slowest_ms" else row[key] + report.get(key, 0)
        start = report["next"]
    return row


def damaged(target: Target, seed: str, number: int) -> tuple[str, bytes | None]:
    """The damaged file of an input: its name, and its content if it is one."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(target, Path(folder) / "files")
        bench.damage(random.Random(f"{target.name} {seed} {number}"))
        path = bench.folder / bench.changed
        return bench.changed, path.read_bytes() if path.is_file() else None


def run_range(target: Target, seed: str, start: int, stop: int) -> int:
    """Run the inputs of these numbers in this process; print what became of them as JSON, the last line counts."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no report
    row: dict[str, Any] = dict.fromkeys(COLUMNS, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(target, Path(folder) / "files")
        soft = os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[0]) + (4 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
        for number in range(start, stop):
            print(json.dumps({**row, "next": number}), file=output, flush=True)
            bench.damage(random.Random(f"{target.name} {seed} {number}"))
            begun = time.perf_counter()
            signal.alarm(HANGS_SECONDS)
            try:
                row["accepted" if bench.try_read() else "refused"] += 1
            except Exception as error:
                row["failures"] += 1
                path = bench.folder / bench.changed
                keep(target.name, number, describe(error), bench.changed, path.read_bytes() if path.is_file() else None)
            signal.alarm(0)
            row["inputs"] += 1
            row["slowest_ms"] = max(row["slowest_ms"], round(1000 * (time.perf_counter() - begun)))
        print(json.dumps({**row, "next": stop}), file=output, flush=True)
    return 0


def describe(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-6000:]


def keep(target: str, number: int, reason: str, name: str, content: bytes | None) -> None:
    """Keep a damaged file, whose folder is named by the target and the input's number, with the reason beside it."""
    folder = KEPT / target / str(number)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / name).parent.mkdir(parents=True)
    if content is not None:
        (folder / name).write_bytes(content)
    folder.with_suffix(".txt").write_text(f"{name}\n{reason}")


def read_again(targets: dict[str, Target], file: Path) -> int:
    """Read a kept file in place of the one of its name, and let an error through."""
    kept = next(parent for parent in file.parents if parent.name in targets)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(targets[kept.name], Path(folder) / "files")
        bench.put(Path(*file.relative_to(kept).parts[1:]).as_posix(), file.read_bytes())
        print("accepted" if bench.try_read() else "refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
