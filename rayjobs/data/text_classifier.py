"""CLIP's zero-shot classifier, computed once and cached."""

from rayjobs.errors import UserError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
import torch
from pydantic import Field
from ray.data import ActorPoolStrategy
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from cafo.images import Preprocess, load_image
from cafo.errors import ImageError
from cafo.prompt import zero_shot_classifier
from cafo.encoder_spec import EncoderSpec
from rayjobs.config import config
from rayjobs.models.encoder import VisionEncoderConfig, EncoderInfo, load_vision_encoder
from rayjobs.data.image_list import ImageList
from rayjobs.data.image_source import STORE_IMAGES, part_name
from rayjobs.cluster.shared_storage import assert_shared_storage
from rayjobs.storage.download import cached_path
from rayjobs.storage.paths import resolve_path
from rayjobs.console import Progress
from rayjobs.cluster.ray_data import ray_data_context
from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.storage.files import atomic_path, read_parquet, write_parquet
from rayjobs.storage.fingerprint import fingerprint
from rayjobs.data.feature_store import _device


class ClassifierFile(NamedTuple):
    """CLIP's zero-shot classifier as it is kept: W (C, N), and how many sentences it is made of, how many cut."""

    store: str
    weights: Tensor
    sentences: int
    truncated: int


def prepare_classifier(
    encoder: EncoderInfo,
    prompts: Mapping[str, Sequence[str]],
    names: Sequence[str],
    cache: Path,
    resources: dict[str, float],
) -> ClassifierFile:
    """CLIP's classifier from sentences, encoded unless it is there already."""
    if not encoder.clip:
        raise UserError(f"{encoder.identity} has no text encoder: the first encoder of a set has to be a CLIP")
    identity = ["classifier", 1, encoder.identity, [[name, list(prompts[name])] for name in names]]
    path = cache / "classifiers" / f"{fingerprint(identity)[:20]}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        task = ray.remote(_write_classifier).options(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))
        with reraise_user_errors():
            ray.get(task.remote(path, encoder.spec, prompts, list(names), _device(resources)))
    with safe_open(cached_path(path), "pt") as file:
        counts = file.metadata()
        return ClassifierFile(path.stem, file.get_tensor("weights"), int(counts["sentences"]), int(counts["truncated"]))


def _write_classifier(
    path: Path, spec: EncoderSpec, prompts: Mapping[str, Sequence[str]], names: list[str], device: str
) -> None:
    from cafo.encoders import ClipEncoder

    assert_shared_storage(path.parent)
    encoder = load_vision_encoder(spec, device)
    assert isinstance(encoder, ClipEncoder)
    made = zero_shot_classifier(encoder, prompts, names)
    counts = {"sentences": str(made.sentences), "truncated": str(len(made.truncated))}
    with atomic_path(path) as temporary:
        save_file({"weights": made.weights.contiguous()}, temporary, counts)
