"""The same command through `ray job submit` against a head of its own."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from adapter.checkpoint import read_adapter
from tests.conftest import ROOT

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
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
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
    process.wait(timeout=60)


def submit(head: tuple[str, dict[str, str]], *arguments: str) -> subprocess.CompletedProcess[str]:
    address, environment = head
    command = [BIN / "ray", "job", "submit", f"--address={address}", "--working-dir=.", "--", "python", "-m", "rayjobs"]
    deadline = time.monotonic() + 90
    while True:
        done = subprocess.run(
            [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        if "No available agent" not in done.stderr or time.monotonic() > deadline:  # the head answers before its agent
            return done
        time.sleep(1)


def test_a_submitted_job_trains_and_a_wrong_one_fails(
    head: tuple[str, dict[str, str]], tiny_base: Path, records: Path, tmp_path: Path
) -> None:
    arguments = [
        "adapter-train",
        f"base.path={tiny_base}",
        f"data.path=[{records}]",
        "data.max_length=200",
        "adapter.n_layers=2",
        "train.epochs=1",
        "train.global_batch=20",
        "scale.workers=2",
        f"run.storage={tmp_path}",
        "run.name=submitted",
    ]
    done = submit(head, *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "submitted" / "result.json").read_text())
    assert result["steps"] == 6
    assert torch.isfinite(read_adapter(tmp_path / "submitted" / "adapter.safetensors").prompt).all()

    wrong = submit(head, *arguments, "train.epochz=1")
    assert wrong.returncode != 0
    assert re.search(r"train\.epochz: unknown key; did you mean train\.epochs\?", wrong.stdout + wrong.stderr)
