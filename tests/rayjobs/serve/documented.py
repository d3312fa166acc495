"""The blocks of docs/serve.md about a server, run from nothing as they stand: in an empty folder, one after another.

    python -m tests.rayjobs.serve.documented [FOLDER]

The last command of the first block is the server, which stays until the other blocks have been run. FOLDER: where to
run them; what an earlier call left there is used again. Minutes, and port 8000, are needed.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import httpx

from tests.documents import Block, blocks
from tests.waiting import PATIENCE_S, wait_until

ADDRESS = ("127.0.0.1", 8000)
URL = f"http://{ADDRESS[0]}:{ADDRESS[1]}"
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run(folder: Path) -> None:
    """Run the blocks in a folder. Raises CalledProcessError for a command that fails, and SystemExit if something
    listens at the port already, which would answer in the server's place."""
    with socket.socket() as probe:
        if probe.connect_ex(ADDRESS) == 0:
            raise SystemExit(f"{URL} is in use: end what listens there")
    first, *others = [one for one in blocks("bash", "python") if one.needs == "a server that stays"]
    *before, server = first.text.strip().splitlines()
    for command in before:
        show(command)
        subprocess.run(["bash", "-c", command], cwd=folder, env=ENVIRONMENT, check=True)
    ask(folder, server, others)


def ask(folder: Path, server: str, asked: Sequence[Block]) -> None:
    """Run the blocks that ask while a server runs."""
    show(server)
    process = subprocess.Popen(server.split(), cwd=folder, env=ENVIRONMENT)
    try:
        wait_until(lambda: answers() or process.poll() is not None, "the server answers", pause_s=0.5)
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}")
        for block in asked:
            show(block.text)
            shell = ["bash", "-ec"] if block.language == "bash" else [sys.executable, "-c"]
            text = block.text.replace("curl ", "curl --fail-with-body --no-progress-meter ")
            subprocess.run([*shell, text], cwd=folder, env=ENVIRONMENT, check=True, timeout=PATIENCE_S)
            print()
    finally:
        process.send_signal(signal.SIGINT)
        print(f"the server ended with {process.wait(PATIENCE_S)}")


def answers() -> bool:
    """Return whether the server answers."""
    try:
        return httpx.get(f"{URL}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def show(text: str) -> None:
    print(f"\n$ {text.strip()}", flush=True)


def main() -> None:
    if len(sys.argv) > 1:
        run(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder))


if __name__ == "__main__":
    main()
