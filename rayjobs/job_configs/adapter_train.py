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
    from adapter.adaption import AdaptionConfig
    from adapter.image_projection import ImageProjectionConfig


@config
class AdapterConfig:
    """The adapter's shape."""

    n_layers: int = Field(default=30, ge=1)
    """L: number of adapted layers, counted from the top."""
    prompt_length: int = Field(default=10, ge=1)
    """K: number of prompt tokens in each adapted layer."""
    attention: Literal["zero-init", "rand-init", "prefix"] = "zero-init"
    """Attention to the prompts: `zero-init` is the paper's method; its ablations are `rand-init`, whose gate is fixed
    at 1, and `prefix`, an ordinary prefix that shares one softmax with the words."""

    def adaption(self, vision: ImageProjectionConfig | None) -> AdaptionConfig:
        """Return the shape that the adapter library takes; vision: the projection of image features, if any."""
        from adapter.adaption import AdaptionConfig, Gate

        gates: dict[str, Gate] = {"zero-init": "tanh", "rand-init": "one", "prefix": "prefix"}
        return AdaptionConfig(
            n_layers=self.n_layers, prompt_length=self.prompt_length, gate=gates[self.attention], vision=vision
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
