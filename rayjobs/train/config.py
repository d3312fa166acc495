"""Training settings: the recipe, the optimizer, ZeRO and the workers."""

import math
from typing import Any, Literal

from pydantic import Field

from rayjobs.cluster.worker_pool import WorkerPoolConfig
from rayjobs.config import config

SHORT_WARMUP = 0.4
"""Share of warm-up in a training shorter than its warm-up: that of the default recipe, 2 of 5 epochs."""


@config
class TrainConfig:
    """Training recipe. The defaults are those of LLaMA-Adapter on Alpaca."""

    epochs: float = Field(default=5, gt=0)
    """Number of passes over the training records."""
    warmup_epochs: float = Field(default=2, ge=0)
    """Epochs of linear warm-up; after it the learning rate falls to 0 along half a cosine. If they are more than
    `epochs`, 40% of the steps are warm-up instead, as in the default recipe."""
    global_batch: int = Field(default=64, ge=1)
    """Records per optimizer step, over all workers. Results do not depend on the number of workers."""
    token_budget: int = Field(default=4096, ge=1)
    """Tokens per micro-batch of a worker, padding included. Lower it if memory runs out."""
    shuffle_records: int = Field(default=65536, ge=1)
    """Number of records shuffled together. A data set up to this size is shuffled as a whole."""
    seed: int = Field(default=0, ge=0)
    """Seed for prompt initialisation and record shuffling."""
    checkpoint_activations: bool = False
    """Recompute the adapted layers in the backward pass, which saves memory and takes about a third more time."""
    checkpoint_every_s: float | None = Field(default=60, gt=0)
    """Save a checkpoint every so many seconds, in the background; null saves none by time. A failure costs the steps
    since the last checkpoint."""
    checkpoint_every_steps: int | None = Field(default=None, ge=1)
    """Save a checkpoint also every N steps; null saves none by steps. The last step is always saved."""
    validate_every_steps: int | None = Field(default=None, ge=1)
    """Validate every N steps, and also before the first step and after the last; null validates once an epoch."""

    def learning_rate(self, step: int, steps_per_epoch: int, peak: float) -> float:
        """Return the learning rate of a step: `peak` at the end of the warm-up, just above 0 at the last step."""
        warmup, total = self.warmup_steps(steps_per_epoch), self.total_steps(steps_per_epoch)
        if step + 1 <= warmup:
            return peak * (step + 1) / warmup
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, total - warmup)))

    def warmup_steps(self, steps_per_epoch: int) -> float:
        """Return the length of the warm-up, which ends within the training, so that the peak is reached."""
        if self.warmup_epochs <= self.epochs:
            return self.warmup_epochs * steps_per_epoch
        return max(1, round(SHORT_WARMUP * self.total_steps(steps_per_epoch)))

    def describe_short_warmup(self) -> str:
        """Return how the warm-up differs from `warmup_epochs`; an empty text if it does not."""
        if self.warmup_epochs <= self.epochs:
            return ""
        return (
            f"train.warmup_epochs={self.warmup_epochs:g} is longer than train.epochs={self.epochs:g}: "
            f"{SHORT_WARMUP:.0%} of the steps are warm-up instead"
        )

    def total_steps(self, steps_per_epoch: int) -> int:
        return max(1, round(self.epochs * steps_per_epoch))


@config
class ZeroConfig:
    """DeepSpeed's ZeRO: which tensors are partitioned over the workers."""

    stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage: 0 partitions nothing, 1 the optimizer state, 2 also gradients, 3 also the frozen base."""
    offload_optimizer: dict[str, Any] | None = None
    """DeepSpeed's `offload_optimizer` section, such as {device: cpu}."""
    offload_param: dict[str, Any] | None = None
    """DeepSpeed's `offload_param` section, for stage 3, such as {device: cpu}."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keys of DeepSpeed's `zero_optimization` section, passed on as they are."""


@config
class OptimizerConfig:
    """AdamW. The defaults are those of LLaMA-Adapter."""

    base_lr: float = Field(default=9e-3, gt=0)
    """Learning rate at a global batch of 256 records. The rate used is base_lr × global_batch / 256."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments."""
    weight_decay: float = Field(default=0.02, ge=0)
    """Decoupled weight decay of all trainable parameters, gates included."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the whole gradient; null does not clip, as in the paper."""

    def describe_default_rate(self, method: str, usual: float | None) -> str:
        """Return that the learning rate is the default, of prompts, where another method's usual one is known and
        differs; an empty text otherwise."""
        if usual is None or self.base_lr != type(self)().base_lr:
            return ""
        return (
            f"optimizer.base_lr is {self.base_lr:g}, the default, which is for prompts; published recipes of {method} "
            f"come to about {usual:g}"
        )

    def peak_lr(self, global_batch: int) -> float:
        """The learning rate at the end of the warm-up, which is proportional to the global batch."""
        return self.base_lr * global_batch / 256


@config
class ScaleConfig(WorkerPoolConfig):
    """Number of Ray Train workers, each one DeepSpeed rank, and the resources of each."""

    max_failures: int = Field(default=3, ge=-1)
    """Number of worker failures to recover from; -1 for any number. Preempted nodes are not counted."""
    max_preemptions: int = Field(default=-1, ge=-1)
    """Number of node preemptions (spot machines taken away after a notice) to recover from; -1 for any number."""
    grow_every_s: float = Field(default=60, ge=0)
    """Seconds between attempts to grow while there are fewer than workers.max. Growing restarts the workers from the
    last checkpoint."""
    threads_per_worker: int | None = Field(default=None, ge=1)
    """Threads of a worker without a GPU; null shares the node's cores among its workers. A tiny model is fastest with
    one thread. The last bits of sums depend on the number of threads."""
