"""CLIP's last visual projection, and the image encoder without it.

An embedding is z = W x + b, with x what the encoder has pooled of an image: for a ViT the class token after the final
LayerNorm, for OpenAI's ResNets what the attention pool has gathered. ProLIP trains W and so needs x
(`cafo.methods.prolip`).

Legend: B images, C width of an embedding, E width before the projection.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

from cafo.errors import EncoderError
from cafo.methods.base import Projection


def split_projection(visual: nn.Module) -> tuple[nn.Module, Projection]:
    """Return CLIP's image encoder without its last projection, (B, 3, S, S) → (B, E), and the projection.

    The encoder that is returned shares its tensors with the given one, which is not changed.

    Args:
        visual: open_clip's image encoder.

    Raises:
        EncoderError: the encoder does not end with one linear layer.
    """
    tensors = (*visual.parameters(), *visual.buffers())
    bare: Any = copy.deepcopy(visual, {id(tensor): tensor for tensor in tensors})  # other modules, the same tensors
    match visual:
        case VisionTransformer() if visual.proj is not None:
            bare.proj = None
            return bare, Projection(visual.proj.detach().T.contiguous())
        case ModifiedResNet():
            bare.attnpool.c_proj = _identity_of(visual.attnpool.c_proj)
            return bare, _read(visual.attnpool.c_proj)
        case TimmModel() if isinstance(getattr(visual.head, "proj", None), nn.Linear):
            last = visual.head.proj
            bare.head.proj = nn.Identity()
            return bare, _read(last)
    raise EncoderError(
        f"CLIP's image encoder ({type(visual).__name__}) does not end with one linear projection, so there are no "
        "features before it; ProLIP needs them, RLA does not"
    )


def _read(last: nn.Linear) -> Projection:
    return Projection(last.weight.detach(), None if last.bias is None else last.bias.detach())


def _identity_of(last: nn.Linear) -> nn.Linear:
    """Return a layer that gives what `last` takes; the attention pool reads its weight and bias, not the layer."""
    width = last.in_features
    identity = nn.Linear(width, width, device=last.weight.device, dtype=last.weight.dtype)
    with torch.no_grad():
        identity.weight.copy_(torch.eye(width))
        identity.bias.zero_()
    return identity.requires_grad_(False)
