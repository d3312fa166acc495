"""Which frozen tower is meant. Importing this imports no tower: that takes seconds."""

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Which tower to load; small and plain enough for a config file."""

    kind: Literal["clip", "dino", "timm", "pixels"]
    """`pixels` is no tower but the picture itself, shrunk: the floor under every encoder"""
    name: str = ""
    """architecture in open_clip's or timm's spelling, or a folder in timm's format; a custom CLIP takes it from its
    JSON, timm from the folder of the weights, DINO is `resnet50` by default; of `pixels`, the side"""
    weights: str = ""
    """open_clip's pretrained tag, a local file or folder, or `random:SEED` for an untrained tower"""
    config: str = ""
    """open_clip model JSON of a custom CLIP; found beside the weights when empty"""
    quick_gelu: bool | None = None
    """a statement about the weights, needed only where they cannot tell: were they trained with QuickGELU?"""
    precision: Precision = "fp32"
