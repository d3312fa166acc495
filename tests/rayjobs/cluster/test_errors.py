"""A user error that a worker raises reaches the user as itself, wherever Ray has put it."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from logging.handlers import MemoryHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.data
from ray.exceptions import RuntimeEnvSetupError
from ray.train import ControllerError

from rayjobs.cluster import errors
from rayjobs.cluster.errors import call_on_prepared_nodes, parse_user_error, reraise_user_errors
from rayjobs.cluster.ray_data import ray_data_context
from rayjobs.errors import DataError, StorageError
from rayjobs.lifecycle import job
from rayjobs.runs.run_dir import RunConfig
from tests.conftest import ROOT
from tests.waiting import wait_until


def failing_function(batch: Any) -> Any:
    raise DataError("record 7 has no output")


class FailingActor:
    """Fails in its constructor or at its first batch."""

    def __init__(self, where: str) -> None:
        if where == "constructor":
            raise DataError("record 7 has no output")

    def __call__(self, batch: Any) -> Any:
        raise DataError("record 7 has no output")


@pytest.fixture
def kept_log() -> Iterator[None]:
    """Ray Data's log as it is where Ray Data was imported before us, and a handler that keeps all its records."""
    handler = MemoryHandler(capacity=10**6, flushLevel=10**6)
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.ray
@pytest.mark.usefixtures("cluster", "kept_log")
@pytest.mark.parametrize("where", ["task", "constructor", "call"])
def test_an_error_in_a_data_pipeline_reaches_the_driver_as_it_was_raised(where: str) -> None:
    actor = {"fn": FailingActor, "fn_constructor_args": (where,), "concurrency": 1}
    failing = {"fn": failing_function} if where == "task" else actor
    with pytest.raises(DataError) as raised, reraise_user_errors(), ray_data_context(preserve_order=False):
        list(ray.data.range(8).map_batches(**failing).iter_batches())
    assert str(raised.value) == "record 7 has no output"
    # no actor keeps its CPU, although the error is kept, as a notebook keeps the last one, and so is the log
    wait_until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], "free CPUs")


SCRIPT = """
from rayjobs.cluster.environment import set_environment
set_environment()
import ray
import ray.data
from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.cluster.ray_data import ray_data_context
from rayjobs.cluster.ray_init import connect
from rayjobs.errors import USER_ERRORS
from tests.rayjobs.cluster.test_errors import FailingActor
connect()
try:
    with reraise_user_errors(), ray_data_context(preserve_order=False):
        actors = ray.data.range(8).map_batches(FailingActor, fn_constructor_args=("constructor",), concurrency=1)
        list(actors.iter_batches())
except USER_ERRORS as error:
    print(error)
"""


@pytest.mark.ray
def test_an_error_in_an_actor_s_constructor_is_one_line_on_the_terminal() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["record 7 has no output"]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("end", "error", "message"),
    [
        ("rayjobs.errors.DataError: one line", DataError, "one line"),
        ("rayjobs.errors.StorageError: two\nlines: of it\n", StorageError, "two\nlines: of it"),
        ("FileNotFoundError: [Errno 2] No such file: '/x'", FileNotFoundError, "[Errno 2] No such file: '/x'"),
        ("rayjobs.errors.DataError: a\nFailed to apply UDF transform after 1/1 attempts", DataError, "a"),
    ],
)
def test_a_printed_traceback_gives_back_its_error(end: str, error: type[Exception], message: str) -> None:
    parsed = parse_user_error(f'ray::Worker.__init__()\n  File "a.py", line 1, in b: c\n    d()\n{end}')
    assert type(parsed) is error
    assert str(parsed) == message


def test_a_printed_fault_of_the_program_stays_one() -> None:
    assert parse_user_error("  File a\nKeyError: 'x'") is None
    assert parse_user_error("The actor died unexpectedly before finishing this task.\n\tclass_name: A") is None


class Unprepared:
    """Work that finds a node unprepared the first few times."""

    def __init__(self, times: int, error: Exception) -> None:
        self.left, self.calls, self.error = times, 0, error

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.left:
            raise self.error
        return "done"


def test_work_on_a_node_that_was_not_prepared_is_tried_again_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "AGAIN_AFTER_S", 0)
    unprepared = RuntimeEnvSetupError("Local directory does not exist")
    of_training = ControllerError(unprepared)
    for error in (unprepared, of_training):
        assert call_on_prepared_nodes(Unprepared(3, error)) == "done"
    for work, calls in ((Unprepared(9, of_training), 4), (Unprepared(1, RuntimeError("another")), 1)):
        with pytest.raises(type(work.error)):
            call_on_prepared_nodes(work)
        assert work.calls == calls


def test_a_job_is_such_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "AGAIN_AFTER_S", 0)
    work = Unprepared(1, RuntimeEnvSetupError("Local directory does not exist"))
    settings = SimpleNamespace(JOB="job", run=RunConfig(name="run", storage=str(tmp_path)))
    assert job(lambda _: {"headline": work()})(settings) == {"headline": "done"}
