"""The same command on a cluster: `ray job submit` with this folder as the working directory."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def submit_command(job: str, config: str | None, overrides: Sequence[str]) -> list[str]:
    """What to type for a job that runs here. Raises ValueError for a config file that would not be uploaded."""
    if config is not None and not Path(config).resolve().is_relative_to(Path.cwd()):
        raise ValueError(f"{config} is not below {Path.cwd()}, which is what a cluster gets to see; copy it there")
    given = ["--config", os.path.relpath(config)] if config is not None else []
    return ["ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "rayjobs", job, *given, *overrides]


def submit(command: Sequence[str]) -> int:
    """Submits to the cluster of RAY_API_SERVER_ADDRESS or RAY_ADDRESS, or else one whose dashboard is tunnelled to
    this machine; prints the job's output as it comes. Returns the job's exit code.

    The cluster's key in ~/.ray/auth_token is shown where there is one.
    """
    environment = {"RAY_ADDRESS": "http://127.0.0.1:8265", **os.environ}
    if (Path.home() / ".ray" / "auth_token").exists():
        environment.setdefault("RAY_AUTH_MODE", "token")
    print(shlex.join(command), flush=True)
    beside = Path(sys.executable).with_name("ray")
    return subprocess.run([beside, *command[1:]], env=environment, check=False).returncode
