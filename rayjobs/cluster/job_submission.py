"""Submit a command to a cluster, as `ray job submit` does, with the current folder as the working directory."""

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

from rayjobs.cluster.ray_init import INTERRUPTED
from rayjobs.config import flatten, given_values
from rayjobs.console import printable, verbose
from rayjobs.errors import UserError
from rayjobs.shipped_configs import is_shipped
from rayjobs.storage.paths import is_url

STOPPED_EXIT_CODE = 143
"""Exit code of a job that `ray job stop` has ended: that of a process ended by SIGTERM."""


def cluster_environment() -> dict[str, str]:
    """Return the environment variables that lead Ray to the cluster.

    That is the cluster that RAY_API_SERVER_ADDRESS or RAY_ADDRESS names, else the one whose dashboard is tunnelled to
    this machine. The token is sent if ~/.ray/auth_token exists, unless RAY_AUTH_MODE is set.
    """
    token = Path.home() / ".ray" / "auth_token"
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "http://127.0.0.1:8265"
    return {
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE") or ("token" if token.exists() else "disabled"),
        "RAY_ADDRESS": address,
    }


def job_command(
    job: str, config_class: type, config: str | None, overrides: Sequence[str], *, verbose: bool = False
) -> list[str]:
    """Return the command that runs on the head node.

    config_class: the job's `Config`. config: the settings file, or the name of one of this package. overrides: settings
    as `section.key=value`.

    Raises UserError for files that would be missing there, and for outputs that would be lost with the job's folder.
    """
    shipped = config is not None and is_shipped(config)
    if config is not None and not shipped and not Path(config).resolve().is_relative_to(Path.cwd()):
        raise UserError(f"--config {config} is not below {Path.cwd()}, the folder that is uploaded; copy it there")
    settings = given_values(config_class, config, overrides)[0]
    values = {"run.storage": "runs", **flatten(settings)}
    # A single answer of adapter-generate writes no run folder.
    outputs = ["run.storage", "run.cache"] if job == "demo" or values.get("run.name") else []
    for name in [*outputs, "out"]:
        path = values.get(name) or "/"
        if not is_url(path) and not os.path.isabs(path):
            raise UserError(
                f"{name} is {path}, which on a cluster is in a folder that is deleted when the job ends: "
                "give a URL, or an absolute path that every node sees"
            )
    _check_uploaded([*_iterate_leaves("", settings), *([] if shipped else [("--config", config)])])
    file = [] if config is None else ["--config", config if shipped else os.path.relpath(config)]
    return ["python", "-m", "rayjobs", job, *file, *overrides, *(["--verbose"] if verbose else [])]


def _iterate_leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (full name, value) of everything in nested mappings and lists. Items of a list share its name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _iterate_leaves(f"{name}.{key}" if name else key, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _iterate_leaves(name, inner)
    else:
        yield name, value


def _check_uploaded(settings: Iterable[tuple[str, Any]]) -> None:
    """Raise UserError for an existing relative path that Ray does not upload: it leaves out what git ignores."""
    paths = [
        (name, os.path.normpath(path))
        for name, path in settings
        if name not in ("run.name", "run.storage", "run.cache")
        if isinstance(path, str) and path and not is_url(path) and not os.path.isabs(path)
    ]
    inside = [path for _, path in paths if not path.startswith("..")]
    with suppress(FileNotFoundError):  # git is not installed
        command = ["git", "check-ignore", "--stdin", "-z"]
        answer = subprocess.run(command, input="\0".join(inside), capture_output=True, text=True, check=False)
        ignored = answer.stdout.split("\0")
        for name, path in paths:
            if path in ignored or (path.startswith("..") and os.path.exists(path)):
                raise UserError(
                    f"{name} is {path}, which is not uploaded, because git ignores it or it is not below {Path.cwd()}: "
                    "give a URL, or an absolute path that every node sees"
                )


def ray_submit_command(command: Sequence[str]) -> str:
    """Return the `ray job submit` command that does what `submit` does."""
    variables = [f"{name}={value}" for name, value in cluster_environment().items()]
    return shlex.join([*variables, "ray", "job", "submit", "--working-dir", ".", "--", *command])


def submit(command: Sequence[str]) -> int:
    """Run a command on the cluster of `cluster_environment`, print its output as it comes and return its exit code.

    If the same command is running there already, it is followed from the beginning of its output instead. Ctrl-C leaves
    the job running and returns 130. Raises ConnectionError if the cluster does not answer, or stops answering.
    """
    from aiohttp import ClientError
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient
    from requests import RequestException

    for name in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.INFO if verbose() else logging.ERROR)
    print(printable(ray_submit_command(command)), flush=True)
    job_id, address = f"raysubmit_{uuid.uuid4().hex[:16]}", cluster_environment()["RAY_ADDRESS"]
    try:
        client = JobSubmissionClient(address)
        running = _find_running(client, shlex.join(command))
        job_id = running or job_id
        if not running:
            client.submit_job(entrypoint=shlex.join(command), submission_id=job_id, runtime_env={"working_dir": "."})
        print(f"{'already running' if running else 'submitted'} as {job_id}", flush=True)
        asyncio.run(_print_logs(client, job_id))
        return _exit_code(client.get_job_info(job_id))
    except KeyboardInterrupt:
        print(f"\nthe submitted job keeps running; the same command, or ray job logs -f {job_id}, follows it again")
        print(f"ray job stop {job_id} stops it")
        return INTERRUPTED
    except (RequestException, ClientError) as error:
        raise ConnectionError(f"the cluster at {address} has stopped answering: {error}") from error
    except (RuntimeError, RayError) as error:
        raise ConnectionError(str(error)) from error


def _find_running(client: Any, entrypoint: str) -> str | None:
    """Return the submission id of a job with this entrypoint that has not ended."""
    jobs = [job for job in client.list_jobs() if job.submission_id and job.entrypoint == entrypoint]
    return next((job.submission_id for job in jobs if not job.status.is_terminal()), None)


def _exit_code(job: Any) -> int:
    """Return the exit code of a job that has ended, as a shell would show it."""
    from ray.job_submission import JobStatus

    if job.status == JobStatus.STOPPED:
        return STOPPED_EXIT_CODE
    if job.driver_exit_code is None:  # it was never started, or its node is lost
        print(job.message or job.status)
        return int(job.status != JobStatus.SUCCEEDED)
    return job.driver_exit_code if job.driver_exit_code >= 0 else 128 - job.driver_exit_code


async def _print_logs(client: Any, job_id: str) -> None:
    async for lines in client.tail_job_logs(job_id):
        print(lines, end="", flush=True)
