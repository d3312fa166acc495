"""Ray started or joined, quietly; run folders; progress; errors in the words of whoever raised them."""

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib import metadata
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import yaml
from pydantic import Field

from rayjobs.config import config, to_dict
from rayjobs.hardware import HARDWARE, hardware
from rayjobs.places import AnyPath, is_url, not_the_same, place
from rayjobs.runs import begin
from rayjobs.tables import write_json, write_text
from rayjobs.tracking import TrackConfig, open_trackers

QUIET = {
    "DS_LOG_LEVEL": "error",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TQDM_DISABLE": "1",
}
"""What keeps libraries from writing over the progress display."""

BEHAVIOUR = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_core_worker_rpc_server_reconnect_timeout_max_s": "4",
    "RAY_grpc_client_keepalive_time_ms": "15000",
    "RAY_grpc_client_keepalive_timeout_ms": "20000",
    "RAY_raylet_rpc_server_reconnect_timeout_max_s": "4",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",
}
"""Reports are polled often, so that they do not hold up short steps; workers that find no place are asked for again,
perhaps fewer of them; the workers that one of them has left alone are ended rather than asked to part in good order;
where a process does not answer, it is asked every 4 s, and not every minute, whether its machine is lost; who waits for
a task's answer makes sure of the connection after 15 s, and gives it up after another 20, not after seven minutes."""


@config
class RunConfig:
    """Where a run lives. The same command on the same folder resumes it."""

    name: str = Field(pattern=r"^[\w.\-]+$")
    """The run's name; its folder is `storage/name`."""
    storage: AnyPath = "runs"
    """The folder of all runs; on a cluster, one that every node sees, or a URL such as s3://bucket/runs."""
    cache: AnyPath | None = None
    """Where prepared data is kept and shared between runs, a folder or a URL; by default `storage/cache`."""
    track: TrackConfig = TrackConfig()

    @property
    def folder(self) -> Path:
        return place(self.storage) / self.name

    @property
    def cache_folder(self) -> Path:
        return place(self.cache) if self.cache else place(self.storage) / "cache"


def verbose() -> bool:
    """Whether Ray and DeepSpeed may be heard: the command line's --verbose."""
    return os.environ.get("RAYJOBS_VERBOSE") == "1"


def environment() -> dict[str, str]:
    """Environment variables for this process and every worker; what is set already stays."""
    wanted = BEHAVIOUR if verbose() else {**BEHAVIOUR, **QUIET}
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def connect(*shared: Path) -> None:
    """Joins the cluster that RAY_ADDRESS names (as `ray job submit` sets it), or starts one on this machine.

    A cluster that this process is connected to already is used as it is.

    shared: folders that its nodes write to, and read. Raises ValueError if one of them does not see one.
    """
    os.environ.update(environment())  # some of it is read when Ray's libraries are imported
    import ray

    if not ray.is_initialized():
        _join()
    for folder in dict.fromkeys(shared):
        if not is_url(folder):
            _is_seen(folder)


def _join() -> None:
    import ray

    local = "RAY_ADDRESS" not in os.environ
    if local:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with nullcontext() if verbose() else _without_stderr():
        ray.init(
            address="local" if local else None,
            include_dashboard=False if local else None,
            logging_level="INFO" if verbose() else "ERROR",
            log_to_driver=verbose(),
            runtime_env={"env_vars": environment()},
        )
    end_on_sigterm()  # Ray has made it an exit of its own


def _is_seen(folder: Path) -> None:
    """Asks every other node for a file in the folder; those that come later ask themselves (`check_seen`). Raises
    ValueError naming those that do not see it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    here = ray.get_runtime_context().get_node_id()
    others = {node["NodeID"]: node["NodeName"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here}
    if not others:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(prefix=".seen-", dir=folder) as file:
        asked = ray.remote(os.path.lexists)
        told = {
            asked.options(num_cpus=0, scheduling_strategy=On(node, soft=False)).remote(file.name): name
            for node, name in others.items()
        }
        blind = []
        for answer, name in told.items():
            with suppress(ray.exceptions.RayError):  # a node that goes as it is asked
                if not ray.get(answer, timeout=60):
                    blind.append(name)
    if blind:
        raise ValueError(not_the_same(folder, blind))


def end_on_sigterm() -> None:
    """Lets SIGTERM, which `ray job stop` sends, end this process as Ctrl-C does: a run that is left can be resumed."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Ray's core announces its log level on the file descriptor itself, before it takes notice of that level."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


@contextmanager
def data_context(*, preserve_order: bool, patience_s: float = 3600) -> Iterator[None]:
    """Ray Data with small blocks, so that rows flow as soon as they are made, and quiet.

    patience_s: without a block moving for so long, as while machines are on their way, it errs; -1 is for ever.
    """
    from ray.data import DataContext

    saved = DataContext.get_current()
    context = saved.copy()
    context.execution_options.preserve_order = preserve_order
    context.target_max_block_size = 1 << 20
    context.execution_no_progress_timeout_s = patience_s
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    DataContext._set_current(context)
    try:
        yield
    finally:
        DataContext._set_current(saved)


@contextmanager
def unwrapped() -> Iterator[None]:
    """Lets a ValueError or OSError raised in a Ray task through as itself, without Ray's wrapping."""
    try:
        yield
    except Exception as error:
        for cause in causes(error):
            if type(cause).__module__.partition(".")[0] != "ray" and isinstance(cause, ValueError | OSError):
                message, ray_added, _ = str(cause).partition("\nFailed to apply UDF transform")
                if ray_added:
                    cause.args = (message,)
                raise cause from None
        raise


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and all that it was raised from, outermost first."""
    seen: list[BaseException] = []
    pending: list[Any] = [error]
    while pending:
        current = pending.pop(0)
        if not isinstance(current, BaseException) or any(current is one for one in seen):
            continue
        seen.append(current)
        yield current
        failures = getattr(current, "worker_failures", {})
        controller = getattr(current, "controller_failure", None)
        pending += [getattr(current, "cause", None), current.__cause__, controller, *failures.values()]


def open_run(run: RunConfig, settings: Any) -> Path:
    """The run's folder, with the resolved config, versions, commit, hardware and the run's record written into it; they
    are those of the outer job where one job is a part of another's run."""
    if begin(run.folder, settings):
        write_text(run.folder / "config.yaml", yaml.safe_dump(to_dict(settings), sort_keys=False))
        write_json(run.folder / "versions.json", versions())
        write_json(run.folder / HARDWARE, hardware())
        for tracker in open_trackers(run.folder, run.track):  # where they fail, they should before the work
            tracker.close()
    return run.folder


def versions() -> dict[str, str]:
    """What a result depends on besides its config."""
    names = ("torch", "ray", "deepspeed", "pyarrow", "open_clip_torch", "sentencepiece", "numpy")
    found = {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}
    here = Path(__file__).parent
    git = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {**found, "commit": git.stdout.strip() if git.returncode == 0 else "unknown"}


class Progress:
    """One line of progress: a live bar on a terminal, a plain line every few seconds otherwise."""

    PLAIN_EVERY_S = 10.0

    def __init__(self, title: str, *, unit: str, total: int | None = None, done: int = 0) -> None:
        """done: what was there before."""
        self.title, self.unit, self.total = title, unit, total
        self.done, self.note = done, ""
        self.first: tuple[float, int] | None = None

    def __enter__(self) -> "Progress":
        self.started = self.printed = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar
            from rich.table import Column, Table

            class WithTable(Bar):
                table: Sequence[Sequence[str]] = ()

                def get_renderables(self) -> Iterator[Any]:
                    yield self.make_tasks_table(self.tasks)
                    if len(self.table) > 1:
                        grid = Table(*self.table[0], box=None, pad_edge=False, header_style="dim")
                        for row in self.table[1:]:
                            grid.add_row(*row)
                        yield grid

            console = Console(stderr=True)
            self.bar = WithTable(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24 if console.width >= 100 else 6),
                MofNCompleteColumn(),
                TextColumn(self.unit),
                TimeElapsedColumn(),
                TextColumn("{task.fields[pace]}"),
                TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True)),  # cut before the others
                console=console,
                expand=True,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.done, pace="", note="")
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For Ray Tune, which writes its callbacks down as they begin: the display stays where it is."""
        return {name: value for name, value in vars(self).items() if name != "bar"}

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        elif self.done:
            self._print()

    def advance(self, count: int = 1, note: str = "") -> None:
        self.update(self.done + count, note)

    def update(self, done: int, note: str = "", table: Sequence[Sequence[str]] = ()) -> None:
        """Sets how much is done, with a note such as the loss, and a table, its columns first, that only a terminal
        shows."""
        if self.first is None and done > self.done:
            self.first = time.monotonic(), done
        self.done, self.note = done, note or self.note
        if self.bar is not None:
            self.bar.table = table
            note = "" if len(table) > 1 else self.note
            self.bar.update(self.task, completed=done, pace=self._pace(), note=note)
        elif time.monotonic() - self.printed > self.PLAIN_EVERY_S:
            self._print()

    def _pace(self) -> str:
        """How fast it goes, and until when: since the first update, so that neither the start nor what was there before
        counts, and not before a second has passed since."""
        seconds, made = (time.monotonic() - self.first[0], self.done - self.first[1]) if self.first else (0.0, 0)
        if seconds < 1 or not made:
            return ""
        rest = (self.total or 0) - self.done
        left = f", {rest * seconds / made:.0f} s left" if rest > 0 else ""
        rate = made / seconds
        return f"{rate:,.0f} {self.unit}/s{left}" if rate >= 100 else f"{rate:.3g} {self.unit}/s{left}"

    def _print(self) -> None:
        self.printed = time.monotonic()
        of = f"/{self.total}" if self.total else ""
        done = f"{self.title}: {self.done}{of} {self.unit} in {self.printed - self.started:.0f} s"
        print("  ".join(part for part in (done, self._pace(), self.note) if part), file=sys.stderr, flush=True)
