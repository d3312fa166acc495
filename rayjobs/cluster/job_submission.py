"""The same command on a cluster: what `ray job submit` does, with this folder as the working directory."""

import asyncio
import logging
import os
import shlex
import subprocess
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rayjobs.config import flatten, given_values
from rayjobs.console import verbose
from rayjobs.errors import UserError
from rayjobs.storage.paths import is_url

STOPPED_EXIT_CODE = 143
"""The exit code of a job that `ray job stop` ended: that of a process ended by SIGTERM."""


def cluster_environment() -> dict[str, str]:
    """Environment variables that lead to the cluster: to the one that they name already, or else to one whose dashboard
    is tunnelled to this machine; its key is shown where there is one in ~/.ray/auth_token.

    Ray reads RAY_AUTH_MODE when it is imported.
    """
    key = Path.home() / ".ray" / "auth_token"
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "http://127.0.0.1:8265"
    return {
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE") or ("token" if key.exists() else "disabled"),
        "RAY_ADDRESS": address,
    }


def job_command(job: str, config: str | None, overrides: Sequence[str], *, verbose: bool = False) -> list[str]:
    """What runs on the head. Raises ValueError for what would not be there, or not stay."""
    if config is not None and not Path(config).resolve().is_relative_to(Path.cwd()):
        raise UserError(f"{config} is not below {Path.cwd()}, which is what a cluster gets to see; copy it there")
    given = given_values(Any, config, overrides)[0]
    told = {"run.storage": "runs", **flatten(given)}
    kept = ["run.storage", "run.cache"] if job == "demo" or told.get("run.name") else []  # one answer leaves nothing
    for name in [*kept, "out"]:
        path = told.get(name) or "/"
        if not is_url(path) and not os.path.isabs(path):
            raise UserError(
                f"{name} is {path}, which on a cluster is a folder that goes when the job ends: give a URL, or an "
                "absolute path that every node sees"
            )
    _check_uploaded([("--config", config), *_leaves("", given)])
    file = ["--config", os.path.relpath(config)] if config is not None else []
    return ["python", "-m", "rayjobs", job, *file, *overrides, *(["--verbose"] if verbose else [])]


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a config's mappings and lists hold, by its name in full."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}" if name else key, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(name, inner)
    else:
        yield name, value


def _check_uploaded(told: Iterable[tuple[str, Any]]) -> None:
    """Raises ValueError for a relative path that Ray leaves out of what it uploads: it heeds git's list of those."""
    paths = [
        (name, os.path.normpath(path))
        for name, path in told
        if name not in ("run.name", "run.storage", "run.cache")
        if isinstance(path, str) and path and not is_url(path) and not os.path.isabs(path)
    ]
    inside = [path for _, path in paths if not path.startswith("..")]
    with suppress(FileNotFoundError):  # no git
        asked = ["git", "check-ignore", "--stdin", "-z"]
        answer = subprocess.run(asked, input="\0".join(inside), capture_output=True, text=True, check=False)
        ignored = answer.stdout.split("\0")
        for name, path in paths:
            if path in ignored or (path.startswith("..") and os.path.exists(path)):
                raise UserError(
                    f"{name} is {path}, which git ignores or which is not below {Path.cwd()}, so that it is not "
                    "uploaded: give a URL, or an absolute path that every node sees"
                )


def ray_submit_command(command: Sequence[str]) -> str:
    """The same through Ray's own command line."""
    known = [f"{name}={value}" for name, value in cluster_environment().items()]
    return shlex.join([*known, "ray", "job", "submit", "--working-dir", ".", "--", *command])


def submit(command: Sequence[str]) -> int:
    """Runs a command on the cluster that `reach` names, and prints its output as it comes; one that runs there already
    is shown from its beginning. Returns its exit code.

    Raises ConnectionError if the cluster does not answer, or ceases to.
    """
    from ray.exceptions import RayError
    from ray.job_submission import JobStatus, JobSubmissionClient

    for told_by in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(told_by).setLevel(logging.INFO if verbose() else logging.ERROR)
    print(ray_submit_command(command), flush=True)
    entrypoint, name = shlex.join(command), f"raysubmit_{uuid.uuid4().hex[:16]}"
    try:
        client = JobSubmissionClient(cluster_environment()["RAY_ADDRESS"])
        same = [job for job in client.list_jobs() if job.submission_id and job.entrypoint == entrypoint]
        there = [job.submission_id for job in same if not job.status.is_terminal()]
        name = next(iter(there), name)
        if not there:
            client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env={"working_dir": "."})
        print(f"{'already there' if there else 'submitted'} as {name}", flush=True)
        asyncio.run(_show(client, name))
        job = client.get_job_info(name)
    except KeyboardInterrupt:
        print(f"\nwhat was submitted goes on: the same command, or ray job logs -f {name}, shows it again")
        print(f"ray job stop {name} ends it")
        return 130
    except (RuntimeError, RayError) as error:
        raise ConnectionError(str(error)) from error
    if job.status == JobStatus.STOPPED:
        return STOPPED_EXIT_CODE
    if job.driver_exit_code is None:  # it never came to run, or its node is gone
        print(job.message or job.status)
        return int(job.status != JobStatus.SUCCEEDED)
    return job.driver_exit_code if job.driver_exit_code >= 0 else 128 - job.driver_exit_code


async def _show(client: Any, name: str) -> None:
    async for lines in client.tail_job_logs(name):
        print(lines, end="", flush=True)
