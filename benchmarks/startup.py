"""Measure the time from the command to the first optimizer step of adapter-train, and to the next step after a kill.

    python -m benchmarks.startup --base stories260K --data alpaca_2000.json [--workers 2] [--rounds 3] [--json]

Each round starts `rayjobs adapter-train --config alpaca_tiny` in a process of its own, with a new run folder and a new
cache, so that the records are tokenized; files that the system has read before are in memory. It waits for the first
row of metrics.jsonl, kills the whole process tree after the first checkpoint, gives the same command again and waits
for the first row of a step that was not made before. A third command makes a few steps and ends, for the account of the
time that result.json holds (`seconds_to_first_step`).

Rows are written at most once a second, so that times are up to a second too long.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from rayjobs.storage.files import read_json, read_jsonl

LIMIT_S = 240.0
"""Longest time that a step is waited for."""


def last_step(folder: Path) -> int:
    """Return the last step in a run's metrics, 0 before the first."""
    path = folder / "metrics.jsonl"
    rows = read_jsonl(path) if path.exists() else []
    return max((row["step"] for row in rows if "loss" in row), default=0)


def start(words: list[str]) -> subprocess.Popen[bytes]:
    """Start the job in a process group of its own."""
    command = [sys.executable, "-m", "rayjobs", "adapter-train", "--config", "alpaca_tiny", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def seconds_to_step(process: subprocess.Popen[bytes], folder: Path, step: int, begin: float) -> float:
    """Wait for a step of at least this number; return the seconds since `begin`."""
    while last_step(folder) < step:
        if process.poll() is not None or time.monotonic() - begin > LIMIT_S:
            sys.exit(f"{folder}: step {step} was not made")
        time.sleep(0.05)
    return time.monotonic() - begin


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its descendants at once."""
    tree = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in tree:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def measure(words: list[str], storage: Path) -> dict[str, Any]:
    """Return the times of one round, and the account of the third command."""
    folder = storage / "run"
    given = [*words, f"run.storage={storage}", f"run.cache={storage / 'cache'}", "run.name=run"]
    long = [*given, "train.epochs=50", "train.checkpoint_every_steps=4"]
    begin = time.monotonic()
    process = start(long)
    first = seconds_to_step(process, folder, 1, begin)
    while not list(folder.glob("train/**/checkpoint*")):
        time.sleep(0.05)
    kill(process)
    made = last_step(folder)
    begin = time.monotonic()
    process = start(long)
    again = seconds_to_step(process, folder, made + 1, begin)
    kill(process)
    short = [word.replace("run.name=run", "run.name=short") for word in given]
    if start([*short, "train.epochs=0.1", f"run.cache={storage / 'other-cache'}"]).wait(LIMIT_S):
        sys.exit(f"{storage}: the short run failed")
    account = read_json(storage / "short" / "result.json")["seconds_to_first_step"]
    return {"first_step_s": first, "resumed_step_s": again, "account": account, "load": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a small base")
    parser.add_argument("--data", required=True, help="instruction records")
    parser.add_argument("--workers", type=int, default=2, help="workers of the run (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="times that everything is measured (default: 3)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    given = parser.parse_args()
    words = [f"base.path={Path(given.base).absolute()}", f"data.path={Path(given.data).absolute()}"]
    words.append(f"scale.workers={given.workers}")
    rounds = []
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as storage:
            rounds.append(measure(words, Path(storage)))
        print(rounds[-1], flush=True)
    figures = {name: statistics.median(one[name] for one in rounds) for name in ("first_step_s", "resumed_step_s")}
    print(f"command to first step {figures['first_step_s']:.1f} s, to the next step after a kill "
          f"{figures['resumed_step_s']:.1f} s, medians of {given.rounds}")  # fmt: skip
    if given.json:
        print(json.dumps({**figures, "rounds": rounds}))


if __name__ == "__main__":
    main()
