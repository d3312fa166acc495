"""Settings of the job adapter-train."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from rayjobs.config import config
from rayjobs.data.records import DataConfig
from rayjobs.models.base_model import BaseModelConfig
from rayjobs.models.image_conditioning import VisionConfig
from rayjobs.runs.run_dir import RunConfig
from rayjobs.train.config import OptimizerConfig, ScaleConfig, TrainConfig, ZeroConfig

if TYPE_CHECKING:
    from adapter.image_projection import ImageProjectionConfig
    from adapter.methods.base import AdapterMethod

Method = Literal["zero_init", "rand_init", "prefix", "v2", "lora", "ia3", "bias", "full"]
"""The names in `adapter.methods.registry.METHODS`."""
Linear = Literal["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
"""The names in `adapter.methods.base.LINEARS`."""

PAPER_LAYERS = 30
"""Layers with prompts, of LLaMA 7B's 32."""


@config
class AdapterConfig:
    """The adapter's method and shape."""

    method: Method = "zero_init"
    """`zero_init` is LLaMA-Adapter, with its ablations `rand_init`, whose gate is fixed at 1, and `prefix`, an ordinary
    prefix that shares one softmax with the words; `v2` is LLaMA-Adapter V2; `lora` adds low-rank matrices, `ia3` scales
    and `bias` biases; `full` trains the whole base, in fp32."""
    n_layers: int | None = Field(default=None, ge=1)
    """L: number of adapted layers, counted from the top; those with prompts in `v2`. null for all layers, of which the
    methods with prompts take at most 30, as the paper does. `full` always trains all."""
    prompt_length: int = Field(default=10, ge=1)
    """K: number of prompt tokens in each layer with prompts, of zero_init, rand_init, prefix and v2; of v2 also the
    number of tokens that an image becomes."""
    image_layers: int = Field(default=1, ge=1)
    """E: number of layers, counted from the lowest, in which v2 shows an image. They have no prompts.
    Without a vision section it has no effect."""
    rank: int = Field(default=8, ge=1)
    """r: inner width of the matrices of lora."""
    alpha: float = Field(default=16, gt=0)
    """The product of lora's matrices is scaled by alpha / rank."""
    targets: list[Linear] = Field(default=["wq", "wv"], min_length=1)
    """The linear layers that lora adapts: of attention wq, wk, wv, wo; of the feed-forward layer w1, w2, w3."""

    def build(self, base_layers: int, vision: ImageProjectionConfig | None) -> AdapterMethod:
        """Return the adapter that the adapter library takes, for a base of so many layers.

        vision: the projection of image features, if any. Raises AdapterError for a method that cannot read images.
        """
        from adapter.methods.registry import make_method

        prompted = self.method in ("zero_init", "rand_init", "prefix", "v2")
        free = base_layers - (self.image_layers if self.method == "v2" and vision else 0)
        return make_method(
            self.method,
            n_layers=self.n_layers or (max(0, min(PAPER_LAYERS, free)) if prompted else None),
            prompt_length=self.prompt_length,
            image_layers=self.image_layers,
            rank=self.rank,
            alpha=self.alpha,
            targets=tuple(self.targets),
            vision=vision,
        )


@config
class Config:
    """Settings of adapter-train."""

    JOB: ClassVar = "adapter-train"

    base: BaseModelConfig
    data: DataConfig
    adapter: AdapterConfig = AdapterConfig()
    vision: VisionConfig | None = None
    """Image encoder and projection; null leaves the records' images out."""
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    zero: ZeroConfig = ZeroConfig()
    scale: ScaleConfig = ScaleConfig()
    run: RunConfig
