"""Disjoint parameters for images and text in joint training (LLaMA-Adapter V2, arXiv 2304.15010, section 3.3).

    records with an image       train the parts of images: the projection and the gates of the layers that see an image
    records without one         train all other parts

Both run through the same layers. Parts of the other kind compute as ever, and their gradients are 0 (and not None, so
that all workers have gradients of the same parameters). A pass holds records of one kind; a batch of both is run as two
passes.

B rows, T tokens of the longest, n images, F features of an image.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adapter.errors import AdapterError
from adapter.image_projection import Images
from adapter.methods.base import AdapterPart


def run_learning(pictured: bool, module: nn.Module, *inputs: Any) -> Tensor:
    """The module's output on records that all have an image, or none has: the parts of this kind alone learn.

    It sets every part itself, so that a layer that is recomputed in the backward pass learns as it did in the forward
    pass.
    """
    for part in module.modules():
        if isinstance(part, AdapterPart):
            part.learns = part.of_images == pictured
    output: Tensor = module(*inputs)
    return output


def shows_images(images: Images | None, n_rows: int) -> bool:
    """True if all rows of a pass have an image, False if none has. Raises AdapterError for rows of both kinds."""
    n = 0 if images is None else len(images[1])
    if 0 < n < n_rows:
        raise AdapterError(
            f"{n} of {n_rows} rows have an image, and rows with one and without train disjoint parameters: run them "
            "apart, or give their labels"
        )
    return n > 0


def split_kinds(tokens: Tensor, labels: Tensor, images: Images) -> Iterator[tuple[Tensor, Tensor, Images]]:
    """Split a batch (B, T) of both kinds, with the features (n, F) and rows (n,) of its images: first the rows without.

    A batch of one kind is yielded as it is.
    """
    features, rows = images
    if not 0 < len(rows) < len(tokens):
        yield tokens, labels, images
        return
    pictured = rows.to(tokens.device)
    without = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    without[pictured] = False
    yield tokens[without], labels[without], (features[:0], rows[:0])
    yield tokens[pictured], labels[pictured], (features, torch.arange(len(rows), device=rows.device))
