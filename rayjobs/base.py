"""The frozen LLaMA that a job names, and what may run copies of it."""

from pathlib import Path

import ray
from pydantic import Field

from adapter.base import Base
from adapter.tokenizer import Tokenizer
from adapter.weights import Checkpoint, open_checkpoint
from rayjobs.config import config
from rayjobs.engine import DTYPES, Dtype


@config
class BaseConfig:
    """The frozen LLaMA."""

    path: str
    """A folder in Meta's format (params.json) or Hugging Face's (config.json)."""
    tokenizer: str | None = None
    """SentencePiece model; by default `tokenizer.model` in the folder or beside it."""
    dtype: Dtype = "fp32"
    """What the frozen weights are held in; prompts and gates are always fp32."""

    def open(self) -> tuple[Checkpoint, Path]:
        """The checkpoint and its tokenizer's path, both proven to fit. Raises ValueError naming what does not."""
        checkpoint = open_checkpoint(self.path)
        path = Path(self.tokenizer) if self.tokenizer else checkpoint.tokenizer_path
        if path is None:
            raise ValueError(f"{self.path}: no tokenizer.model in the folder or beside it; set base.tokenizer")
        Tokenizer(path).check_fits(checkpoint.config.vocab_size)
        return checkpoint, path.absolute()

    def load(self, adapter: str | None, device: str, *, tower: str | None = None) -> Base:
        """The whole model in memory, with an adapter file of any known form if one is named.

        tower: the identity of the tower whose features it will be given. Raises ValueError for an adapter of another.
        """
        base = Base.load(self.path, tokenizer=self.tokenizer, dtype=DTYPES[self.dtype], device=device)
        if adapter is not None:
            base.load_adapter(adapter, tower=tower)
        return base


@config
class PoolConfig:
    """How many workers, and what each may use."""

    workers: int = Field(default=1, ge=1)
    """Processes that hold the model, each on its own device."""
    cpus_per_worker: float | None = Field(default=None, gt=0)
    """CPUs that a worker reserves; null leaves a share for Ray Data."""
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """GPUs that a worker reserves; null is 1 where the cluster has enough, else 0."""

    def resources(self) -> dict[str, float]:
        """Per worker, on the cluster as it is. Raises ValueError at once for a request that can never fit."""
        have = ray.cluster_resources()
        cpus = self.cpus_per_worker or min(1.0, max(have["CPU"] - 1, 0.5) / self.workers)
        gpus = self.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if have.get("GPU", 0) >= self.workers else 0.0
        for name, want in (("CPU", cpus), ("GPU", gpus)):
            if want * self.workers > have.get(name, 0):
                raise ValueError(
                    f"{self.workers} workers of {want:g} {name} need {want * self.workers:g} {name}, the cluster has "
                    f"{have.get(name, 0):g}: lower scale.workers or scale.{name.lower()}s_per_worker"
                )
        return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
