"""Global features of an image at several depths of its encoder, LLaMA-Adapter's (arXiv 2303.16199, section 3.3).

A ViT gives its class token after evenly spaced blocks; a convolutional network the mean of every stage's feature map,
and its final embedding.

Legend: B images, S side in pixels.
"""

from __future__ import annotations

from typing import Any

import open_clip
import timm
from torch import Tensor

from cafo.errors import EncoderError


def multi_scale_features(network: Any, batch: Tensor, blocks: int) -> list[Tensor]:
    """Return the features of images (B, 3, S, S) at several depths, each (B, own width).

    Args:
        network: a CLIP's image encoder, or a network of timm.
        batch: the images.
        blocks: number of a ViT's blocks that are read.

    Raises:
        EncoderError: more blocks than the ViT has, or a network without `forward_intermediates`.
    """
    if isinstance(network, open_clip.timm_model.TimmModel):
        network = network.trunk
    if isinstance(network, open_clip.transformer.VisionTransformer):
        outputs = network.forward_intermediates(
            batch,
            indices=_even_blocks(blocks, network.transformer.layers),
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        return [prefix[:, 0] for prefix in outputs["image_intermediates_prefix"]]
    if isinstance(network, open_clip.modified_resnet.ModifiedResNet):
        outputs = network.forward_intermediates(batch, indices=[1, 2, 3, 4])  # 0 is the stem
        return [m.mean(dim=(2, 3)) for m in outputs["image_intermediates"]] + [outputs["image_features"]]
    if isinstance(network, timm.models.VisionTransformer):
        pairs: Any = network.forward_intermediates(
            batch,
            indices=_even_blocks(blocks, len(network.blocks)),
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return [prefix[:, 0] if network.num_prefix_tokens else patches.mean(dim=1) for patches, prefix in pairs]
    if not hasattr(network, "forward_intermediates"):
        raise EncoderError(f"{type(network).__name__} has no `forward_intermediates`, so no features at several scales")
    final, maps = network.forward_intermediates(batch, output_fmt="NCHW")
    stages = maps[1:] if isinstance(network, timm.models.ResNet) else maps  # a ResNet's first map is its stem
    return [m.mean(dim=(2, 3)) for m in stages] + [network.forward_head(final).flatten(1)]


def _even_blocks(blocks: int, depth: int) -> list[int]:
    """Return evenly spaced block numbers that end with the last: 4 of 12 → 2, 5, 8, 11."""
    if not 1 <= blocks <= depth:
        raise EncoderError(f"cannot take {blocks} blocks of an encoder with {depth}")
    return [round((i + 1) * depth / blocks) - 1 for i in range(blocks)]
