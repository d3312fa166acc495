"""Serve one frozen base, the adapters of a folder of runs, and saved classifiers, by the OpenAI API.

Adapters are served by the names of their runs, and noticed when they are added or removed; requests with different
ones share a batch. The server runs on Ray Serve until Ctrl-C, at http://127.0.0.1:8000/v1 by default, with a page to
try it at http://127.0.0.1:8000/. Any other address than this machine's own needs a token.
"""

import logging
import os
import socket
import threading
from contextlib import suppress
from typing import Any

from rayjobs.cluster.capacity import cluster_capacity
from rayjobs.cluster.errors import parse_user_error
from rayjobs.cluster.ray_init import connect, handle_interrupts
from rayjobs.console import show_table
from rayjobs.errors import ConfigError, ResourceError
from rayjobs.job_configs.serve import Config
from rayjobs.models.base_model import open_tokenizer
from rayjobs.serve.deployment import check_folders, serve_config, serving
from rayjobs.serve.settings import ServedConfig
from rayjobs.storage.paths import resolve_path
from rayjobs.storage.yaml_file import dump_yaml, write_yaml

logger = logging.getLogger(__name__)


def check(settings: Config, *, weights: bool = True) -> dict[str, str]:
    """Check everything that can be checked before a replica is started; return the plan's rows.

    weights: False to leave the weights of a base on the hub there. With `out` no token is needed here: it is read where
    the file is deployed. Raises a UserError or an AdapterError for the first problem.
    """
    if settings.out is not None:
        token = f"of {settings.server.token_variable}, if it is set where the server is deployed"
    else:
        given = settings.server.token_sha256() is not None
        token = f"of {settings.server.token_variable}" if given else "none, for this machine alone"
    folders = check_folders(settings)
    checkpoint, tokenizer = settings.base.open(weights=weights)
    window = checkpoint.config.max_seq_len
    if (length := settings.engine.max_length or 1) > window:
        raise ConfigError(f"engine.max_length is {length}, the base's window holds {window} tokens: lower it")
    if settings.vision is not None:
        settings.vision.open()
    chat = "its own chat template" if open_tokenizer(tokenizer).chat_template else "Alpaca's template"
    replicas = settings.replicas
    return {
        "base": f"{settings.base.path}, as {settings.base_name}, in {chat}",
        **folders,
        "replicas": str(replicas.autoscaling or replicas.number),
        "engine": f"{settings.engine.slots} slots of {settings.engine.max_length or window:,} tokens",
        "address": address(settings),
        "token": token,
    }


def address(settings: ServedConfig) -> str:
    """The URL of the server."""
    host = settings.server.host
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.server.port}"


def plan(settings: Config) -> None:
    """Show what `run` would do, and Ray Serve's config file."""
    rows = check(settings, weights=False)
    show_table("plan", ["", ""], [list(row) for row in rows.items()])
    print(dump_yaml(serve_config(settings)), end="")


def run(settings: Config) -> dict[str, Any]:
    """Serve until Ctrl-C, or write Ray Serve's config file; return the address."""
    check(settings, weights=settings.out is None)
    if settings.out is not None:
        write_yaml(resolve_path(settings.out), serve_config(settings))
        logger.info("written to %s: serve deploy %s starts it on a cluster", settings.out, settings.out)
        return {"out": settings.out}
    if "RAY_ADDRESS" not in os.environ:
        _check_port(settings.server.host, settings.server.port)
    connect()
    gpus = settings.replicas.gpus
    if gpus is None:
        gpus = 1.0 if cluster_capacity().total("GPU") else 0.0
    try:
        with serving(settings, gpus):
            handle_interrupts()
            logger.info("%s is served at %s/v1; Ctrl-C ends it", settings.base_name, address(settings))
            with suppress(KeyboardInterrupt):
                threading.Event().wait()
    except RuntimeError as error:
        raise parse_user_error(str(error)) or error from None
    return {"address": address(settings)}


def _check_port(host: str, port: int) -> None:
    """Raise ResourceError if nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceError(
                f"server.host={host} server.port={port}: {error.strerror}; end what listens there, or choose another"
            ) from error
