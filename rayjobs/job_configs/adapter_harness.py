"""Settings of the job adapter-harness."""

from typing import ClassVar

from pydantic import Field

from rayjobs.cluster.worker_pool import WorkerPoolConfig
from rayjobs.config import config
from rayjobs.inference.adapter_source import AdapterSourceConfig
from rayjobs.runs.run_dir import RunConfig
from rayjobs.storage.paths import AnyPath, FileOrName


@config
class Config(AdapterSourceConfig):
    """Settings of adapter-harness."""

    JOB: ClassVar = "adapter-harness"

    tasks: list[str] = Field(min_length=1)
    """Tasks, groups and tags of the harness by name; `*` in a name stands for any letters."""
    task_folder: AnyPath | None = None
    """Folder of task files (.yaml) that `tasks` names; null for the harness's own tasks, whose data sets are fetched
    from the Hugging Face hub. Task files may name Python functions beside them, which are run."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Answered examples before each question; null for what each task says."""
    limit: int | None = Field(default=None, ge=1)
    """Documents of each task, the first ones, to try a command; null for all."""
    chat: bool = False
    """Ask in a conversation, in a template, with the examples as earlier turns; false asks by the task's plain text."""
    template: FileOrName | None = None
    """Template of `chat`, as of adapter-generate. null takes that of the adapter's training, or Alpaca's; a base
    without an adapter is asked in its own chat template."""
    system: str | None = None
    """System message, or beginning of a plain text; null for none."""
    max_length: int | None = Field(default=None, ge=2)
    """Most tokens of the model's input; null for the base's window. What is longer loses its beginning."""
    seed: int = Field(default=1234, ge=0)
    """Seed of the choice of examples, of samples, and of the standard errors that are estimated by drawing."""
    bootstrap_draws: int = Field(default=1000, ge=0)
    """Draws for the standard error of a metric that is no mean, such as a perplexity; 0 for none."""
    batch_size: int = Field(default=64, ge=1)
    """Requests that a worker is given at a time; an interrupted run goes on after them."""
    token_budget: int = Field(default=8192, ge=1)
    """Tokens per batch of a worker, padding included."""
    scale: WorkerPoolConfig = WorkerPoolConfig()
    run: RunConfig
