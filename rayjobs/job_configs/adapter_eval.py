"""Settings of the job adapter-eval."""

from typing import ClassVar, Literal

from pydantic import Field

from rayjobs.cluster.worker_pool import WorkerPoolConfig
from rayjobs.config import config
from rayjobs.data.records import RecordsConfig
from rayjobs.errors import ConfigError
from rayjobs.inference.adapter_source import AdapterSourceConfig
from rayjobs.inference.decoding import GreedyDecodingConfig, Reading
from rayjobs.runs.run_dir import RunConfig


@config
class Config(AdapterSourceConfig):
    """Settings of adapter-eval."""

    JOB: ClassVar = "adapter-eval"

    task: Literal["loss", "answers", "scienceqa"] = "loss"
    """Measure: held-out `loss`; generated `answers` beside the records' own, by exact match, ROUGE-L and chrF; or
    accuracy on `scienceqa`, which reads one ScienceQA folder, its test split unless data.path names another."""
    reading: Reading = "generate"
    """Prediction of scienceqa: `generate` a text and read the answer out of it; take the option whose letter has the
    highest `likelihood`; or, `normalised`, the option whose own text has the highest log-likelihood per byte."""
    decoding: GreedyDecodingConfig = GreedyDecodingConfig()
    """Decoding of task=answers."""
    batch_size: int = Field(default=16, ge=1)
    """Problems or answers per batch of a worker."""
    data: RecordsConfig | None = None
    """Records to score; null with `split`."""
    split: Literal["val"] | None = None
    """`val` scores the records that the adapter's own run held out for validation, or its `data.val_path`, in place of
    `data`."""
    allow_training_records: bool = False
    """Score records that the adapter was trained on; the result is labelled. False refuses them."""
    token_budget: int = Field(default=8192, ge=1)
    """Tokens per batch of a worker for task=loss, padding included."""
    scale: WorkerPoolConfig = WorkerPoolConfig()
    run: RunConfig

    def __post_init__(self) -> None:
        if self.split and self.data:
            raise ConfigError("split=val takes the records of the adapter's run: leave out data, or split")
        if self.split and not self.adapter:
            raise ConfigError("split=val takes the records of the run of an adapter: give adapter, or name data.path")
        if not self.split and not self.data:
            raise ConfigError(
                "data.path: required, but not given; name the records to score, or give split=val for those that the "
                "adapter's run held out"
            )

    @property
    def records(self) -> RecordsConfig:
        """The records to score, or those of the adapter's run, of which `split` is scored."""
        from rayjobs.inference.training_records import run_data

        return self.data or run_data(str(self.adapter))
