"""The frozen LLaMA that a job names, and what may run copies of it."""

from pathlib import Path

from pydantic import Field

from adapter.base import Base
from adapter.tokenizer import Tokenizer
from adapter.weights import Checkpoint, open_checkpoint
from rayjobs.capacity import capacity
from rayjobs.config import config
from rayjobs.engine import DTYPES, Dtype
from rayjobs.places import AnyPath, is_url, local_copy, place

DATA_CPUS = 0.5
"""Of every node, for Ray Data, which would otherwise wait for ever beside workers that hold all there is."""


@config
class BaseConfig:
    """The frozen LLaMA."""

    path: AnyPath
    """A folder in Meta's format (params.json) or Hugging Face's (config.json); of a URL every node makes a copy."""
    tokenizer: AnyPath | None = None
    """SentencePiece model; by default `tokenizer.model` in the folder or beside it."""
    dtype: Dtype = "fp32"
    """What the frozen weights are held in; prompts and gates are always fp32."""

    def open(self) -> tuple[Checkpoint, Path]:
        """The checkpoint and its tokenizer's path, both proven to fit. Raises ValueError naming what does not."""
        checkpoint = open_checkpoint(local_copy(self.path))
        path = place(self.tokenizer) if self.tokenizer else checkpoint.tokenizer_path
        if path is None:
            raise ValueError(f"{self.path}: no tokenizer.model in the folder or beside it; set base.tokenizer")
        if is_url(self.path) and not self.tokenizer:
            path = place(self.path) / path.name  # other machines have copies of their own
        Tokenizer(local_copy(path)).check_fits(checkpoint.config.vocab_size)
        return checkpoint, place(path)

    def load(self, adapter: str | None, device: str, *, tower: str | None = None) -> Base:
        """The whole model in memory, with an adapter file of any known form if one is named.

        tower: the identity of the tower whose features it will be given. Raises ValueError for an adapter of another.
        """
        tokenizer = local_copy(self.tokenizer) if self.tokenizer else None
        base = Base.load(local_copy(self.path), tokenizer=tokenizer, dtype=DTYPES[self.dtype], device=device)
        if adapter is not None:
            base.load_adapter(local_copy(adapter), tower=tower)
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

    def resources(self, *, beside: float = DATA_CPUS) -> dict[str, float]:
        """Per worker, on the cluster as it is or may grow. Raises ValueError at once for what can never fit.

        beside: CPUs of each node that no worker takes.
        """
        have = capacity()
        gpus = self.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if have.total("GPU") >= self.workers else 0.0
        tried = [{"CPU": cpus, **({"GPU": gpus} if gpus else {})} for cpus in self._cpus()]
        for worker in tried:
            if not have.known or have.room(worker, beside) >= self.workers:
                return worker
        wanted = " and ".join(f"{amount:g} {name}" for name, amount in tried[0].items())
        kept = f", of which every node keeps {beside:g} CPU for Ray Data" if beside else ""
        raise ValueError(
            f"{self.workers} worker{'s' * (self.workers > 1)} of {wanted} each can never run: there is room for "
            f"{have.room(tried[0], beside)}; the cluster has {have}{kept}"
        )

    def _cpus(self) -> tuple[float, ...]:
        return (self.cpus_per_worker,) if self.cpus_per_worker else (1.0, 0.5, 0.25, 0.1, 0.05, 0.01)
