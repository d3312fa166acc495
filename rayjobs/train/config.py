"""Training settings: recipe, scale, and all that a worker needs to know."""

import math
from dataclasses import dataclass

from pydantic import Field

from adapter.adaption import AdaptionConfig
from rayjobs.cluster.worker_pool import WorkerPoolConfig
from rayjobs.config import config
from rayjobs.data.image_source import ImageSource
from rayjobs.data.sampler import ElasticBatchSampler
from rayjobs.data.token_store import TokenStore
from rayjobs.models.base_model import Dtype
from rayjobs.models.encoder import EncoderInfo
from rayjobs.train.engine import OptimizerConfig, ZeroConfig


@config
class TrainConfig:
    """The recipe; the defaults are LLaMA-Adapter's for Alpaca."""

    epochs: float = Field(default=5, gt=0)
    """Passes over the training records."""
    warmup_epochs: float = Field(default=2, ge=0)
    """Linear warm-up, then half a cosine down to 0."""
    global_batch: int = Field(default=64, ge=1)
    """Records per optimizer step, over all workers."""
    token_budget: int = Field(default=4096, ge=1)
    """Tokens per micro-batch and worker, padding included: the knob for memory."""
    shuffle_records: int = Field(default=65536, ge=1)
    """Records shuffled together; a data set up to this size is shuffled as a whole."""
    seed: int = Field(default=0, ge=0)
    """Of the prompts' initial values and of the order of records."""
    checkpoint_activations: bool = False
    """Recompute the adapted layers in the backward pass: less memory, about a third more time."""
    checkpoint_every_steps: int = Field(default=200, ge=1)
    """How much work a failure may cost."""
    validate_every_steps: int | None = Field(default=None, ge=1)
    """Validate this often, besides before the first step and after the last; null for once an epoch."""

    def learning_rate(self, step: int, steps_per_epoch: int, peak: float) -> float:
        """The rate of one step: reaches `peak` at the end of warm-up; the last step's is just above 0."""
        warmup, total = self.warmup_epochs * steps_per_epoch, self.total_steps(steps_per_epoch)
        if step + 1 <= warmup:
            return peak * (step + 1) / warmup
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, total - warmup)))

    def total_steps(self, steps_per_epoch: int) -> int:
        return max(1, round(self.epochs * steps_per_epoch))


@config
class ScaleConfig(WorkerPoolConfig):
    """How many Ray Train workers, one DeepSpeed rank each, and what each may use."""

    max_failures: int = Field(default=3, ge=-1)
    """Worker failures that the run survives; -1 for any number."""
    grow_every_s: float = Field(default=60, ge=0)
    """Below workers.max, how often it is asked whether there is room for more; growing costs a start, and the steps
    since the last checkpoint."""
    threads_per_worker: int | None = Field(default=None, ge=1)
    """Threads of a worker without a GPU; null shares the machine's cores among its workers. A tiny model is fastest on
    one, and a sum's last bits depend on how many there are."""


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """All that a worker needs to know."""

    base: str
    dtype: Dtype
    adaption: AdaptionConfig
    store: TokenStore
    weights: tuple[float, ...]
    """How often each source's records are trained on in an epoch."""
    pictures: ImageSource | None
    """Where images come from; None for text alone."""
    encoder: EncoderInfo | None
    """What workers encode images with, if they come as pixels."""
    train: TrainConfig
    optimizer: OptimizerConfig
    zero: ZeroConfig

    def order(self, split: str) -> ElasticBatchSampler:
        return ElasticBatchSampler(
            store=self.store,
            split="train" if split == "train" else "val",
            global_batch=self.train.global_batch,
            token_budget=self.train.token_budget,
            shuffle_records=self.train.shuffle_records,
            seed=self.train.seed if split == "train" else None,
            weights=self.weights if split == "train" else (),
            pictures=self.pictures,
        )

    @property
    def total_steps(self) -> int:
        return self.train.total_steps(self.order("train").steps_per_epoch)

    @property
    def peak_lr(self) -> float:
        return self.optimizer.base_lr * self.train.global_batch / 256

    def validates_after(self, step: int) -> bool:
        every = self.train.validate_every_steps or self.order("train").steps_per_epoch
        return bool(self.store.rows("val")) and (step % every == 0 or step == self.total_steps)
