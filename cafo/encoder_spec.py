"""The name of a frozen encoder. Importing this module loads neither open_clip nor timm, which takes seconds."""

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """The encoder to load, in plain values that fit in a config file."""

    kind: Literal["clip", "dino", "timm", "pixels"]
    """library of the encoder; `pixels` is the image itself, scaled down: the baseline that every encoder should beat"""
    name: str = ""
    """architecture in open_clip's or timm's spelling, or a folder in timm's format; the side in pixels for `pixels`.
    Empty: a custom CLIP takes it from its JSON, timm from the folder of the weights, and DINO is `resnet50`."""
    weights: str = ""
    """open_clip's pretrained tag, a local file or folder, or `random:SEED` for an untrained encoder"""
    config: str = ""
    """open_clip model JSON of a custom CLIP; empty: the one beside the weights"""
    quick_gelu: bool | None = None
    """True if the weights were trained with QuickGELU; needed only where neither the file nor its name tells"""
    precision: Precision = "fp32"
