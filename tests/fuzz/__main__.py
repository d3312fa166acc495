"""Try readers on many damaged inputs, each target in a process of its own: `python -m tests.fuzz 100000`.

Inputs that a reader fails on are kept under `build/fuzz/`, each as the damaged file, with the reason beside it;
`--again FILE` reads one of them. The numbers of the inputs make them the same on every machine.
"""

import argparse
import json
import logging
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
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tests.fuzz.mutation import mutate
from tests.fuzz.target import Bench, Target

KEPT = Path("build/fuzz")
LAST = "last"
"""Name of the file that holds the input that atheris tries."""
HANGS_SECONDS = 60
"""Time after which an input that still runs ends its process."""
ADDRESS_SPACE = 4 << 30
"""Bytes that a reader may map or allocate beyond what its process has; one that wants more gets a MemoryError."""
COLUMNS = ("inputs", "refused", "accepted", "failures", "slowest_ms")


def find_targets() -> dict[str, Target]:
    from tests.fuzz import adapter_targets, cafo_targets, rayjobs_targets

    every = (*adapter_targets.TARGETS, *cafo_targets.TARGETS, *rayjobs_targets.TARGETS)
    return {target.name: target for target in every}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("inputs", type=int, nargs="?", default=100_000, help="inputs of all targets together")
    parser.add_argument("--target", action="append", help="a target; several times for several; all by default")
    parser.add_argument("--seed", default="0", help="another text makes other inputs")
    parser.add_argument("--guided", action="store_true", help="let atheris choose inputs by the lines that they reach")
    parser.add_argument("--again", type=Path, help="read a kept input")
    parser.add_argument("--only", metavar="RANGE", help=argparse.SUPPRESS)  # START:STOP, in a process of its own
    options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    if options.only:
        return run_guided(options.target[0], options.seed, *map(int, options.only.split(":")))
    targets = find_targets()
    if unknown := set(options.target or ()) - targets.keys():
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(targets)}")
    if options.again:
        return read_again(targets, options.again)
    chosen = [targets[name] for name in options.target or targets]
    total = sum(target.share for target in chosen)
    failures, rows = 0, []
    print(f"{'target':24} {'inputs':>8} {'refused':>8} {'accepted':>8} {'failures':>8} {'slowest':>11}", flush=True)
    for target in chosen:
        row = run_target(target, options.seed, max(1, options.inputs * target.share // total), guided=options.guided)
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


def run_target(target: Target, seed: str, count: int, *, guided: bool) -> dict[str, int]:
    """Run a target's inputs in processes of their own, a new one after each that a reader has ended."""
    row, start = dict.fromkeys(COLUMNS, 0), 0
    while start < count:
        if guided:
            command = [sys.executable, "-m", "tests.fuzz", "--guided", "--target", target.name, "--seed", seed]
            done = subprocess.run([*command, "--only", f"{start}:{count}"], stdout=subprocess.PIPE, check=False)
            code, output = done.returncode, done.stdout
        else:
            code, output = in_child(partial(run_range, target, seed, start, count))
        if not output.strip():
            raise SystemExit(f"{target.name}: no input could be tried")
        report = json.loads(output.splitlines()[-1])
        if code:
            if guided:
                name, content = report["file"], (KEPT / target.name / LAST).read_bytes()
            else:
                name, content = damaged(target, seed, report["next"])
            keep(target.name, report["next"], f"the process ended with {code}\n", name, content)
            row["failures"] += 1
            report = {**report, "next": report["next"] + 1, "inputs": report["inputs"] + 1}
        for key in COLUMNS:
            row[key] = max(row[key], report.get(key, 0)) if key == "slowest_ms" else row[key] + report.get(key, 0)
        start = report["next"]
    return row


def in_child(function: Callable[[], object]) -> tuple[int, bytes]:
    """Call a function in a process of its own, which has all that is imported here; its exit code and its output."""
    reading, writing = os.pipe()
    if not (pid := os.fork()):
        code = 1
        try:
            os.dup2(writing, 1)
            function()
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        output = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output


def damaged(target: Target, seed: str, number: int) -> tuple[str, bytes | None]:
    """The damaged file of an input: its name, and its content if it is one."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(target, Path(folder) / "files", proven=True)
        bench.damage(random.Random(f"{target.name} {seed} {number}"))
        path = bench.folder / bench.changed
        return bench.changed, path.read_bytes() if path.is_file() else None


class Worker:
    """Tries inputs of one target in this process, within limits, and prints what became of them after each."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.output = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no report
        self.row: dict[str, int] = dict.fromkeys(COLUMNS, 0)
        self.bench = Bench(target, folder / "files")
        used = os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, used + ADDRESS_SPACE))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def tell(self, number: int) -> None:
        """Print the row, the number of the input that comes next, and the file that it damages."""
        print(json.dumps({**self.row, "next": number, "file": self.bench.changed}), file=self.output, flush=True)

    def read(self, number: int) -> None:
        """Read what lies in the bench, and keep it if the reader fails."""
        row, bench = self.row, self.bench
        begun = time.perf_counter()
        signal.alarm(HANGS_SECONDS)
        try:
            row["accepted" if bench.try_read() else "refused"] += 1
        except Exception as error:
            row["failures"] += 1
            path = bench.folder / bench.changed
            content = path.read_bytes() if path.is_file() else None
            keep(bench.target.name, number, describe(error), bench.changed, content)
        signal.alarm(0)
        row["inputs"] += 1
        row["slowest_ms"] = max(row["slowest_ms"], round(1000 * (time.perf_counter() - begun)))


def run_range(target: Target, seed: str, start: int, stop: int) -> None:
    """Run the inputs of these numbers in this process."""
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(target, Path(folder))
        for number in range(start, stop):
            worker.tell(number)
            worker.bench.damage(random.Random(f"{target.name} {seed} {number}"))
            worker.read(number)
        worker.tell(stop)


def run_guided(name: str, seed: str, start: int, stop: int) -> int:
    """Run so many inputs in this process, changed further where they reach lines of ours that none before them did.

    They depend on the machine's speed in nothing, but on the versions of everything.
    """
    import atheris

    with atheris.instrument_imports(include=["adapter", "cafo", "rayjobs"]):
        target = find_targets()[name]
    folder = Path(tempfile.mkdtemp())
    worker = Worker(target, folder)
    bench, number = worker.bench, start
    (folder / "corpus").mkdir()
    (KEPT / name).mkdir(parents=True, exist_ok=True)
    for i, file in enumerate(bench.names):  # the first byte is the number of the file that is damaged
        (folder / "corpus" / str(i)).write_bytes(bytes([i]) + bench.files[file])

    def read(data: bytes) -> None:
        nonlocal number
        place = data[0] % len(bench.names) if data else 0
        bench.put(bench.names[place], data[1:])
        (KEPT / name / LAST).write_bytes(data[1:])  # for the case that it ends this process
        worker.tell(number)
        worker.read(number)
        number += 1
        if number >= stop:
            worker.tell(stop)
            shutil.rmtree(folder)
            os._exit(0)

    def change(data: bytes, size: int, draw: int) -> bytes:
        place = data[0] % len(bench.names) if data else 0
        return bytes([place]) + mutate(data[1:], bench.names[place], random.Random(draw))[: size - 1]

    flags = [f"-seed={zlib.crc32(f'{seed} {start}'.encode())}", "-max_len=1048576", "-rss_limit_mb=0", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *flags, str(folder / "corpus")], read, custom_mutator=change)
    atheris.Fuzz()
    return 0


def describe(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-6000:]


def keep(target: str, number: int, reason: str, name: str, content: bytes | None) -> None:
    """Keep a damaged file, whose folder is named by the target and the input's number, with the reason beside it."""
    folder = KEPT / target / str(number)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if content is not None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
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
