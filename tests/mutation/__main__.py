"""Run the core's tests on mutants of its files: `python -m tests.mutation`, or `--file adapter/loss.py` for one.

No file is changed. A file's tests are loaded once and run once; each mutant is a fork of that process, in which the
functions of the mutant take the place of the file's own. A mutant of what runs at import is a fork that has not
imported the file yet. A mutant is killed if a test fails, or if its process ends in another way: by a signal, or as
it takes several times the processor time of the unchanged file. What became of each is in `build/mutation/`.
"""

import argparse
import functools
import gc
import importlib
import inspect
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, FunctionType

import pytest
from _pytest.main import pytest_runtestloop

from tests.mutation.mutants import Mutant, find_mutants
from tests.mutation.targets import LOADED_FIRST, TARGETS

KEPT = Path("build/mutation").absolute()
LEAST_CPU_SECONDS, TIMES_UNCHANGED = 5, 4
"""Processor time of a mutant: so many times that of the unchanged file, and so many seconds more."""
AT_IMPORT_CPU_SECONDS = 120
WALL_SECONDS = 300
"""A mutant that waits for something that never comes is ended after this time."""
ADDRESS_SPACE = 4 << 30
"""Bytes that a mutant may allocate beyond what its process has."""
CACHE = type(functools.lru_cache(int))

Tell = Callable[[Mutant, str, float], None]


def in_child(function: Callable[[], bool], cpu_seconds: int, output: str = "output.txt") -> tuple[str, float]:
    """Call a function in a process of its own: `passed`, `failed` or a signal's name, and its processor time."""
    if not (pid := os.fork()):
        code = 1
        try:
            os.dup2(os.open(KEPT / output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            if cpu_seconds:
                used = os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[0])
                resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, used + ADDRESS_SPACE))
                resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
            code = int(not function())
        finally:
            sys.stdout.flush()
            os._exit(code)
    deadline = time.monotonic() + WALL_SECONDS
    while not (done := os.wait4(pid, os.WNOHANG))[0]:
        if cpu_seconds and time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    code = os.waitstatus_to_exitcode(done[1])
    outcome = signal.Signals(-code).name if code < 0 else "failed" if code else "passed"
    return outcome, done[2].ru_utime + done[2].ru_stime


def run_tests(tests: Sequence[str], *plugins: object) -> bool:
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-p", "no:faulthandler", f"--basetemp={KEPT / 'files'}"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning", "-m", "not ray and not slow and not gpu"]
    return pytest.main([*options, *tests], plugins) == 0


def functions_of(code: CodeType, inside: str = "") -> Iterator[tuple[str, CodeType]]:
    """The functions of a module and of its classes, by their place and name; not those inside functions."""
    for number, one in enumerate(each for each in code.co_consts if isinstance(each, CodeType)):
        name = f"{inside}{number} {one.co_name}"
        if one.co_flags & inspect.CO_OPTIMIZED:
            yield name, one
        else:
            yield from functions_of(one, f"{name}.")


def at_import(code: CodeType) -> object:
    """Return all that runs when a module is imported, in a form that can be compared."""
    constants = [one for one in code.co_consts if not isinstance(one, CodeType)]
    classes = [one for one in code.co_consts if isinstance(one, CodeType) and not one.co_flags & inspect.CO_OPTIMIZED]
    return code.co_code, repr(constants), code.co_names, [at_import(one) for one in classes]


class File:
    """A file whose mutants are tried."""

    def __init__(self, name: str) -> None:
        self.name, self.path = name, Path(name).absolute()
        self.source = self.path.read_text(encoding="utf-8")
        self.code = self.compile(self.source)
        self.functions = dict(functions_of(self.code))

    def compile(self, source: str) -> CodeType:
        return compile(source, self.path, "exec")

    def changed_functions(self, mutant: Mutant) -> dict[CodeType, CodeType] | None:
        """The code of each changed function, by the code that it replaces; None if more than functions is changed."""
        code = self.compile(mutant.source)
        if at_import(code) != at_import(self.code):
            return None
        return {self.functions[name]: new for name, new in functions_of(code) if new != self.functions[name]}


class Forks:
    """A plugin that runs the collected tests once for each mutant of functions, each time in a fork."""

    def __init__(self, file: File, mutants: Sequence[Mutant], tell: Tell) -> None:
        self.file, self.mutants, self.tell = file, mutants, tell

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        everything = gc.get_objects()
        by_code: dict[CodeType, list[FunctionType]] = {}
        for one in everything:
            if type(one) is FunctionType and one.__code__.co_filename == str(self.file.path):
                by_code.setdefault(one.__code__, []).append(one)
        caches = [
            one for one in everything if type(one) is CACHE and getattr(one.__wrapped__, "__code__", 0) in by_code
        ]
        pytest_runtestloop(session)  # what PyTorch sets up on first use is set up before the forks
        for cache in caches:
            cache.cache_clear()
        del everything
        gc.freeze()

        def run(changed: dict[CodeType, CodeType]) -> bool:
            for old, new in changed.items():
                for function in by_code[old]:
                    function.__code__ = new
            pytest_runtestloop(session)
            return not session.testsfailed

        outcome, seconds = in_child(functools.partial(run, {}), AT_IMPORT_CPU_SECONDS)
        if outcome != "passed":
            raise pytest.UsageError(f"a second run of the tests of {self.file.name} ends with {outcome}")
        limit = LEAST_CPU_SECONDS + int(TIMES_UNCHANGED * seconds)
        for mutant in self.mutants:
            self.tell(mutant, *in_child(functools.partial(run, self.file.changed_functions(mutant) or {}), limit))
        return True


class Importer(MetaPathFinder, SourceFileLoader):
    """Imports a mutant in place of its file."""

    def __init__(self, file: File, mutant: Mutant) -> None:
        super().__init__(".".join(Path(file.name).with_suffix("").parts), str(file.path))
        self.code = file.compile(mutant.source)

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        return spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None

    def get_code(self, fullname: str) -> CodeType:
        return self.code


def run_file(name: str, count: int | None, seed: str) -> None:
    """Try some mutants of a file, and print how many there are, were tried, were killed and were not, and those."""
    file, tests, every = File(name), TARGETS[name], find_mutants(Path(name))
    tried = every if count is None or count >= len(every) else random.Random(f"{seed} {name}").sample(every, count)
    kept = KEPT / f"{name.replace('/', '.')}.jsonl"
    kept.write_text("")

    def tell(mutant: Mutant, outcome: str, seconds: float) -> None:
        row = {"line": mutant.line, "operator": mutant.operator, "change": mutant.change(file.source)}
        with kept.open("a", encoding="utf-8") as rows:
            rows.write(json.dumps({**row, "outcome": outcome, "seconds": round(seconds, 2)}, ensure_ascii=False) + "\n")

    def import_and_run(mutant: Mutant) -> bool:
        sys.meta_path.insert(0, Importer(file, mutant))
        return run_tests(tests)

    of_functions = [mutant for mutant in tried if file.changed_functions(mutant) is not None]
    forks = Forks(file, of_functions, tell)
    if in_child(lambda: run_tests(tests, forks), 0, "collecting.txt")[0] != "passed":
        raise SystemExit(f"the tests of {name} fail on the unchanged file; see {KEPT / 'collecting.txt'}")
    for mutant in tried:
        if mutant not in of_functions:
            tell(mutant, *in_child(functools.partial(import_and_run, mutant), AT_IMPORT_CPU_SECONDS))
    rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    left = sorted((row for row in rows if row["outcome"] == "passed"), key=lambda row: row["line"])
    print(f"{name:30} {len(every):6} {len(rows):6} {len(rows) - len(left):6} {len(left):6}", flush=True)
    for row in left:
        print(f"    {row['line']}: {row['change']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.mutation", description=__doc__)
    parser.add_argument("--file", action="append", choices=TARGETS, help="several times for several files; default all")
    parser.add_argument("--count", type=int, help="mutants of each file, drawn by the seed; default all")
    parser.add_argument("--seed", default="0", help="another text draws other mutants")
    options = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    for name in LOADED_FIRST:
        importlib.import_module(name)
    print(f"{'file':30} {'all':>6} {'tried':>6} {'killed':>6} {'left':>6}", flush=True)
    for name in options.file or TARGETS:
        run_file(name, options.count, options.seed)


if __name__ == "__main__":
    main()
