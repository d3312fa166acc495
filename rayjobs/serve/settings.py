"""The sections of a server's config. Importing this module imports neither PyTorch nor Ray."""

import hashlib
import ipaddress
import os
from typing import Any

from pydantic import Field

from rayjobs.config import config
from rayjobs.errors import ConfigError
from rayjobs.models.base_model import BaseModelConfig
from rayjobs.models.encoder import VisionEncoderConfig
from rayjobs.models.image_conditioning import VisionConfig
from rayjobs.storage.hub import is_hub_path
from rayjobs.storage.paths import LocalPath


@config
class AdaptersConfig:
    """The adapters that are served."""

    folder: LocalPath | None = None
    """Folder of runs: each `adapter.safetensors` in it, at any depth, is served under its run's name. What is added or
    removed later is noticed. null serves the base alone."""
    cache_bytes: int = Field(default=256 * 2**20, ge=0)
    """Memory for adapters, in bytes; the least recently used leave first."""


@config
class CachesConfig:
    """The saved classifiers of CaFo that are served."""

    folder: LocalPath | None = None
    """Folder of runs: the best classifier of each run of cafo-tune and cafo in it is served under the run's name. With
    `encoders`, the files NAME.safetensors in it that CaFo.save wrote are served too, as NAME. null serves none."""
    encoders: dict[str, VisionEncoderConfig] = Field(default_factory=dict)
    """Image encoders by name, for files that CaFo.save wrote. A run's own are known, and may be replaced here."""
    image_bytes: int = Field(default=10 * 2**20, ge=1)
    """Size of the largest image, in bytes, also in conversations."""
    image_pixels: int = Field(default=40_000_000, ge=1)
    """Width x height of the largest image, also in conversations."""


@config
class EngineConfig:
    """The engine of a replica."""

    slots: int = Field(default=16, ge=1)
    """Sequences that are continued together."""
    max_length: int | None = Field(default=None, ge=1)
    """Tokens of a prompt with its answer; null for the base's window. Memory for slots x max_length tokens is allocated
    at once."""
    prefill_tokens: int = Field(default=256, ge=1)
    """Tokens of prompts that are read in one step."""
    prepack: bool = True
    """Lay out the weights for generation on a CPU, which is about twice as fast."""


@config
class LimitsConfig:
    """Limits of a request. One that is beyond a limit is refused, and the others go on."""

    body_bytes: int = Field(default=16 * 2**20, ge=1)
    """Size of a request's body, in bytes."""
    body_timeout_s: float = Field(default=30.0, gt=0)
    """Longest wait for a request's body, in seconds."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens of one answer; null for what the window leaves."""
    choices: int = Field(default=128, ge=1)
    """Answers to one request: its prompts times its `n`."""
    requests: int = Field(default=256, ge=1)
    """Requests that one replica works on at a time; a further one is told to come again (429)."""
    waiting: int = Field(default=1024, ge=1)
    """Answers that may wait for a slot of the engine; a request that would make more is told to come again (429)."""


@config
class ServerConfig:
    """The server's address, and who may use it."""

    host: str = "127.0.0.1"
    """Address to listen at. Any other than a loopback address needs a token."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen at."""
    token_variable: str = "RAYJOBS_SERVE_TOKEN"
    """Environment variable with the token that requests must send, as `Authorization: Bearer TOKEN`. If it is not set,
    loopback requests need none. The token itself is never stored."""
    name: str | None = None
    """Name of the base in requests; null for the last part of base.path."""

    def token_sha256(self) -> str | None:
        """The SHA-256 of the token, in hexadecimal; None without one.

        Raises ConfigError if the address needs a token and there is none.
        """
        token = os.environ.get(self.token_variable, "")
        if not token and not is_loopback(self.host):
            raise ConfigError(
                f"server.host is {self.host}, which others can reach: put a token into the environment variable "
                f"{self.token_variable or '(server.token_variable names none)'}, or listen at 127.0.0.1"
            )
        return hashlib.sha256(token.encode()).hexdigest() if token else None


@config
class ReplicasConfig:
    """The replicas of the server, each with the base and an engine of its own. Ray Serve starts them."""

    number: int = Field(default=1, ge=1)
    """Number of replicas, if `autoscaling` is null."""
    autoscaling: dict[str, Any] | None = None
    """Ray Serve's `autoscaling_config`, such as {min_replicas: 1, max_replicas: 4, target_ongoing_requests: 8}."""
    cpus: float = Field(default=1.0, ge=0)
    """CPUs that each replica reserves, and threads that it computes with."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs that each replica reserves; without one it runs on the CPU. null takes 1 if the cluster has any, else 0."""

    @property
    def several(self) -> bool:
        """There may be more than one replica."""
        return self.number > 1 or self.autoscaling is not None


@config
class ServedConfig:
    """The models that are served, and the server."""

    base: BaseModelConfig
    adapters: AdaptersConfig = AdaptersConfig()
    vision: VisionConfig | None = None
    """Image encoder of the adapters that read images, as in their training; null serves text alone."""
    caches: CachesConfig = CachesConfig()
    engine: EngineConfig = EngineConfig()
    limits: LimitsConfig = LimitsConfig()
    server: ServerConfig = ServerConfig()
    replicas: ReplicasConfig = ReplicasConfig()

    @property
    def base_name(self) -> str:
        """The base's name in requests."""
        path = self.base.path.partition("@")[0] if is_hub_path(self.base.path) else self.base.path
        return self.server.name or path.rstrip("/").rpartition("/")[2] or "base"


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
