"""Settings of the job serve."""

from typing import ClassVar

from rayjobs.config import config
from rayjobs.serve.settings import ServedConfig
from rayjobs.storage.paths import AnyPath


@config
class Config(ServedConfig):
    """Settings of serve."""

    JOB: ClassVar = "serve"

    out: AnyPath | None = None
    """File to write Ray Serve's own config into, for `serve deploy`. Nothing is then started."""
