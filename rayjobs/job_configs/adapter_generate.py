"""Settings of the job adapter-generate."""

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from rayjobs.cluster.worker_pool import WorkerPoolConfig
from rayjobs.config import config
from rayjobs.inference.adapter_source import AdapterSourceConfig
from rayjobs.inference.decoding import DecodingConfig
from rayjobs.runs.run_dir import RunConfig
from rayjobs.storage.paths import AnyPath, FileOrName, resolve_path

TERMINAL = "-"
"""The instruction that stands for those typed on the terminal."""


def _terminal_if_null(instruction: Any) -> Any:
    return TERMINAL if instruction is None else instruction


@config
class Config(AdapterSourceConfig):
    """Settings of adapter-generate."""

    JOB: ClassVar = "adapter-generate"

    instruction: Annotated[str, BeforeValidator(_terminal_if_null)] = TERMINAL
    """One instruction to answer; `-` reads instructions from the terminal, a line each."""
    input: str = ""
    """Input of the instruction."""
    image: AnyPath | None = None
    """Image of the instruction."""
    file: AnyPath | None = None
    """File or URL of records to answer, in the formats of training records, such as {instruction, input?, image?}, or
    {messages} that end with a turn of the user."""
    chat: bool = False
    """Converse on the terminal: each line is the next turn; an empty line or /reset begins another conversation, and
    /exit ends."""
    images: AnyPath | None = None
    """Folder that the file's image paths start from; null for the file's own folder."""
    out: AnyPath | None = None
    """File or URL for the answers to `file`, with all fields of its records: .jsonl or .parquet; null for
    `answers.jsonl` in the run folder."""
    max_rejected_fraction: float = Field(default=0.05, ge=0, le=1)
    """Stop if more than this share of the file's records cannot be answered."""
    template: FileOrName | None = None
    """Template: `chat`, the model's own; `alpaca`; `scienceqa`; `plain`; or a .json or .jinja file, as data.template of
    adapter-train. null takes that of the adapter's training, or Alpaca's; a base without an adapter converses in its
    own."""
    decoding: DecodingConfig = DecodingConfig()
    batch_size: int = Field(default=16, ge=1)
    """Prompts per batch of a worker."""
    scale: WorkerPoolConfig = WorkerPoolConfig()
    run: RunConfig | None = None
    """Run folder and cache for the answers to `file`; required with it."""

    @property
    def answers_file(self) -> Path:
        """The file of the answers to `file`."""
        assert self.run is not None
        return resolve_path(self.out) if self.out else self.run.folder / "answers.jsonl"

    @property
    def one_record(self) -> dict[str, Any]:
        """The instruction of the command line as a record."""
        return {"instruction": self.instruction, "input": self.input}

    @property
    def image_root(self) -> Path:
        """The folder that the file's image paths start from."""
        assert self.file is not None
        return resolve_path(self.images or resolve_path(self.file).parent)
