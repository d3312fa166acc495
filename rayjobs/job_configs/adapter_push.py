"""Settings of the job adapter-push."""

from typing import Annotated, ClassVar

from pydantic import AfterValidator

from rayjobs.config import config
from rayjobs.errors import ConfigError
from rayjobs.storage.hub import is_hub_id
from rayjobs.storage.paths import AnyPath


def _repo_id(text: str) -> str:
    if not is_hub_id(text) or "@" in text:
        raise ConfigError("must be the id of a repository on the hub, org/name, where org may be your own name")
    return text


@config
class Config:
    """Settings of adapter-push."""

    JOB: ClassVar = "adapter-push"

    adapter: AnyPath
    """Folder of a finished run of adapter-train, or an adapter file."""
    repo: Annotated[str, AfterValidator(_repo_id)]
    """Id of the repository on the Hugging Face hub, org/name."""
    public: bool = False
    """Let everyone read the repository; false makes it private, and refuses one that is public already."""
    branch: str = "main"
    """Branch that the commit is added to; it must exist."""
    message: str = "Upload an adapter"
    """First line of the commit's message."""
