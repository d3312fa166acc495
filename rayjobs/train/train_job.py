"""Everything that a training worker is given."""

from dataclasses import dataclass, replace
from functools import cached_property

from adapter.methods.base import AdapterMethod
from rayjobs.data.image_source import ImageSource
from rayjobs.data.sampler import ElasticBatchSampler
from rayjobs.data.token_store import TokenStore, part_source
from rayjobs.models.base_model import Dtype
from rayjobs.models.encoder import EncoderInfo
from rayjobs.train.config import OptimizerConfig, TrainConfig, ZeroConfig


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Everything that a worker is given."""

    base: str
    dtype: Dtype
    adapter: AdapterMethod
    store: TokenStore
    weights: tuple[float, ...]
    """Passes over each source in one epoch."""
    sets: tuple[str, ...]
    """Name of each source, first of training and then of validation records."""
    images: ImageSource | None
    """Source of the records' images; None for text alone."""
    encoder: EncoderInfo | None
    """Encoder that workers run on images that come as pixels; None if features are stored."""
    train: TrainConfig
    optimizer: OptimizerConfig
    zero: ZeroConfig
    stop_after: int | None = None
    """Step after which the workers stop, for a part of the training; None for its end."""

    def sampler(self, split: str) -> ElasticBatchSampler:
        return ElasticBatchSampler(
            store=self.store,
            split="train" if split == "train" else "val",
            global_batch=self.train.global_batch,
            token_budget=self.train.token_budget,
            shuffle_records=self.train.shuffle_records,
            seed=self.train.seed if split == "train" else None,
            weights=self.weights if split == "train" else (),
            images=self.images,
            images_apart=self.images is not None and self.adapter.separates_images,
        )

    def val_samplers(self) -> dict[str, ElasticBatchSampler]:
        """Return the order of the held-out records of each source that has some, by the source's name."""
        parts, sampler = self.store.parts["val"], self.sampler("val")
        samplers = {}
        for source in sorted({part_source(name) for name, _ in parts}):
            own = [(name, rows) for name, rows in parts if part_source(name) == source]
            store = replace(self.store, parts={**self.store.parts, "val": own})
            samplers[self.sets[source]] = replace(sampler, store=store)
        return samplers

    @cached_property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch of training."""
        return self.sampler("train").steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.train.total_steps(self.steps_per_epoch)

    @property
    def last_step(self) -> int:
        """The step after which the workers stop."""
        return self.stop_after or self.total_steps

    @property
    def peak_lr(self) -> float:
        return self.optimizer.peak_lr(self.train.global_batch)

    def validates_after(self, step: int) -> bool:
        every = self.train.validate_every_steps or self.steps_per_epoch
        return bool(self.store.rows("val")) and (step % every == 0 or step == self.total_steps)
