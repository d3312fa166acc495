"""A fitted few-shot method as one file: safetensors with a JSON header, never pickle.

The file has the tensors that the logits at the chosen setting are made of (`Fitted.tensors`), so that it needs neither
the training images nor their features, is small, and gives the logits that were chosen, to the bit. Saving the choice
and fitting again would need the features of all views (for ImageNet 0.7 GB), and a fit is not the same to the bit on
another machine. One general form of all methods' logits would be smaller still, but a method that does not fit it
would need more than a file of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor

from cafo.errors import CafoError
from cafo.files import atomic_path
from cafo.methods import find_method
from cafo.methods.base import Features, Fitted, Method, Setting, reads_unprojected
from cafo.tensor_file import read_tensor_file

FORMAT = "few-shot-method-1"

_ROWS_AT_ONCE = 2048


class TrainingFile(NamedTuple):
    """An image that a method was fitted on."""

    path: str
    """path below the folder of the images"""
    class_name: str
    content: str
    """fingerprint of the file; empty if unknown"""


@dataclass(frozen=True, kw_only=True, eq=False)
class FewShotClassifier:
    """A fitted method at its chosen setting: everything that a classifier needs besides the encoder."""

    name: str
    """the method's name in `METHODS`"""
    method: Method
    fitted: Fitted
    setting: Setting
    class_names: tuple[str, ...]
    """the N classes, in the order of the logits"""
    source: str
    """name of the features that are read: an encoder, or what comes before its last projection"""
    encoders: Mapping[str, str]
    """source → identity of the encoder"""
    images: tuple[TrainingFile, ...] = ()
    """the images that it was fitted on"""
    seed: int = 0
    """seed of the fit"""

    @torch.no_grad()
    def logits(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of images from {source: (B, C)}: (B, N). They are computed block by block.

        Raises:
            CafoError: the features of the source are missing.
        """
        if self.source not in features:
            raise CafoError(f"{self.name} needs features of {self.source}, which were not given")
        alpha = self.setting["alpha"]
        blocks = [
            self.fitted.terms(self._features(block))(self.setting).logits(alpha)
            for block in features[self.source].split(_ROWS_AT_ONCE)
        ]
        return torch.cat(blocks)

    def _features(self, block: Tensor) -> Features:
        if reads_unprojected(self.method):
            return Features(embeddings=block[:, :0], unprojected=block)  # the embeddings are not read
        return Features(embeddings=block)


def save_classifier(classifier: FewShotClassifier, path: str | Path) -> None:
    """Write a fitted method atomically: its tensors at its setting, and everything else in the header."""
    tensors = classifier.fitted.tensors(classifier.setting)
    header = {
        "format": FORMAT,
        "method": classifier.name,
        "constants": json.dumps(classifier.method.constants),
        "setting": json.dumps(dict(classifier.setting)),
        "class_names": json.dumps(classifier.class_names),
        "source": classifier.source,
        "encoders": json.dumps(dict(classifier.encoders)),
        "images": json.dumps(classifier.images),
        "seed": str(classifier.seed),
    }
    with atomic_path(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, header)


def load_classifier(path: str | Path) -> FewShotClassifier:
    """Read a fitted method that `save_classifier` wrote.

    Raises:
        CafoError: the file is missing, cut short, a Git LFS pointer, or not of this format, its method is unknown, or
            its tensors hold NaN or infinity.
    """
    return read_tensor_file(path, FORMAT, _build_classifier, content="classifier", make="fit")


def _build_classifier(header: Mapping[str, str], tensors: dict[str, Tensor]) -> FewShotClassifier:
    method = find_method(header["method"], TypeAdapter(dict[str, Any]).validate_json(header["constants"]))
    setting = TypeAdapter(dict[str, float]).validate_json(header["setting"])
    if lacking := method.defaults.keys() - setting.keys():
        raise CafoError(f"the setting of {header['method']} lacks {', '.join(sorted(lacking))}")
    return FewShotClassifier(
        name=header["method"],
        method=method,
        fitted=method.restore(tensors, setting),
        setting=setting,
        class_names=TypeAdapter(tuple[str, ...]).validate_json(header["class_names"]),
        source=header["source"],
        encoders=TypeAdapter(dict[str, str]).validate_json(header["encoders"]),
        images=TypeAdapter(tuple[TrainingFile, ...]).validate_json(header["images"]),
        seed=int(header["seed"]),
    )
