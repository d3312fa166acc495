"""Settings of the job adapter-judge."""

from typing import ClassVar

from pydantic import Field

from rayjobs.config import config
from rayjobs.models.endpoint import EndpointConfig
from rayjobs.runs.run_dir import RunConfig
from rayjobs.storage.paths import AnyPath


@config
class Config:
    """Settings of adapter-judge."""

    JOB: ClassVar = "adapter-judge"

    first: AnyPath
    """Folder of a run of adapter-eval with task=answers, whose win rate is measured."""
    second: AnyPath
    """Folder of the run that it is compared with, on the same records."""
    endpoint: EndpointConfig
    prompt: AnyPath | None = None
    """Text file of the judge's prompt, with {question}, {first}, {second} and, if it is to see it, {reference}; it asks
    for [[A]], [[B]] or [[tie]]. null for a prompt without the reference."""
    max_tokens: int = Field(default=512, ge=1)
    """Maximum number of tokens of a reply."""
    limit: int | None = Field(default=None, ge=1)
    """Pairs to judge, the first ones; null for all."""
    run: RunConfig
