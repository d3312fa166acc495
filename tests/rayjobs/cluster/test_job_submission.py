"""The same command through `ray job submit` against a head of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest
import ray
import torch

from adapter.adapter_formats import read_adapter
from rayjobs.__main__ import main
from tests.conftest import ROOT
from tests.waiting import PATIENCE_S, wait_until

pytestmark = pytest.mark.ray
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A head node on loopback; yields its dashboard's address and the environment that reaches it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PATH": f"{BIN}:{environment['PATH']}", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    dashboard = free_port()
    process = subprocess.Popen(
        [
            BIN / "ray",
            "start",
            "--head",
            "--block",
            "--node-ip-address=127.0.0.1",
            f"--port={free_port()}",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={free_port()}",  # its default may be another cluster's
            "--dashboard-host=127.0.0.1",
            "--num-cpus=2",
            "--num-gpus=1",  # as Ray counts; there need be none
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=60).close()
            break
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline, "the head does not answer"
            time.sleep(0.5)
    yield address, environment
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:  # outright: taking leave of one another takes them half a minute
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(timeout=PATIENCE_S)


class Submitted:
    """A job as a user submits it, and what became of it."""

    def __init__(self, head: tuple[str, dict[str, str]], *arguments: str) -> None:
        address, environment = head
        self.environment = {**environment, "RAY_ADDRESS": address}
        self.command = [sys.executable, "-m", "rayjobs", *arguments, "--submit"]
        deadline = time.monotonic() + PATIENCE_S
        while True:
            self.process = self.start()
            self.told = self.read_until(" as raysubmit_")
            if self.told or time.monotonic() > deadline:
                break
            output = self.end()[1]
            assert "No available agent" in output, output  # the head answers before its agent
            time.sleep(1)

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def read_until(self, mark: str) -> str:
        """The first line that holds the mark; empty if there is none."""
        assert self.process.stdout is not None
        self.before: list[str] = []
        for line in self.process.stdout:
            self.before.append(line)
            if mark in line:
                return line.strip()
        return ""

    @property
    def name(self) -> str:
        return self.told.split()[-1]

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, "".join(self.before) + output

    def ray(self, *command: str) -> str:
        done = subprocess.run([BIN / "ray", "job", *command], env=self.environment, capture_output=True, text=True)
        return done.stdout + done.stderr


@pytest.fixture
def arguments(tiny_base: Path, records: Path, tmp_path: Path) -> list[str]:
    return [
        "adapter-train",
        f"base.path={tiny_base}",
        f"data.path=[{records}]",
        "data.max_length=200",
        "adapter.n_layers=2",
        "train.epochs=1",
        "train.global_batch=20",
        "scale.workers=2",
        "scale.gpus_per_worker=0",
        f"run.storage={tmp_path}",
        "run.name=submitted",
    ]


def test_a_submitted_job_trains_and_what_fails_there_fails_here(
    head: tuple[str, dict[str, str]], arguments: list[str], tmp_path: Path
) -> None:
    code, output = Submitted(head, *arguments).end()
    assert code == 0, output[-4000:]
    result = json.loads((tmp_path / "submitted" / "result.json").read_text())
    assert result["steps"] == 6
    assert torch.isfinite(read_adapter(tmp_path / "submitted" / "adapter.safetensors").prompt).all()

    code, output = Submitted(head, *arguments, "run.name=wrong", f"base.path={tmp_path / 'nowhere'}").end()
    assert code == 2, output
    (line,) = [line for line in output.splitlines() if "error:" in line]
    assert "nowhere" in line
    assert "Traceback" not in output


class Leaving(BaseHTTPRequestHandler):
    """A head that tells its version, and then answers nothing more."""

    def do_GET(self) -> None:
        if self.path == "/api/version":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"ray_version": ray.__version__}).encode())

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


def test_a_head_that_stops_answering_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with HTTPServer(("127.0.0.1", 0), Leaving) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        assert main(["adapter-generate", "base.path=x", "instruction=x", "--submit"]) == 2
        server.shutdown()
    (told,) = [line for line in caplog.messages if "error:" in line]
    assert f"error: the cluster at {address} has stopped answering: " in told


@pytest.mark.slow
def test_one_instruction_is_answered_by_a_worker_with_a_gpu(
    head: tuple[str, dict[str, str]], tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["adapter-generate", f"base.path={tiny_base}", "instruction=the cat sat", "decoding.max_new_tokens=9"]
    assert main(asked) == 0
    answer = capsys.readouterr().out.strip()
    code, output = Submitted(head, *asked).end()
    assert code == 0, output[-4000:]
    assert output.strip().endswith(answer)
    actors = subprocess.run(
        [BIN / "ray", "list", "actors", f"--address={head[0]}", "--format=json", "--detail"],
        env=head[1], capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(actors.stdout[actors.stdout.index("[") :])
    assert [actor["required_resources"] for actor in found if actor["class_name"] == "ModelActor"] == [
        {"CPU": 1, "GPU": 1}
    ]


@pytest.mark.slow
def test_who_submitted_may_leave_come_back_and_stop_the_job(
    head: tuple[str, dict[str, str]], arguments: list[str], tmp_path: Path
) -> None:
    arguments = [*arguments, "train.epochs=5000", "train.checkpoint_every_steps=20"]
    first, run = Submitted(head, *arguments), tmp_path / "submitted"

    def trains() -> bool:
        assert first.process.poll() is None, first.end()
        return (run / "metrics.jsonl").exists()

    wait_until(trains, "the first metrics")
    first.process.send_signal(signal.SIGINT)
    code, output = first.end()
    assert code == 130
    assert (
        f"the submitted job keeps running; the same command, or ray job logs -f {first.name}, follows it again"
        in output
    )

    again = Submitted(head, *arguments)
    assert again.told == f"already running as {first.name}"
    alone = subprocess.run(
        [sys.executable, "-m", "rayjobs", *arguments],
        cwd=ROOT,
        env=head[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 2
    (line,) = alone.stderr.splitlines()
    assert f"{run} is being run by process" in line

    again.ray("stop", first.name)
    code, output = again.end()
    assert code == 143, output[-4000:]
    assert json.loads((run / "run.json").read_text())["state"] == "interrupted"
