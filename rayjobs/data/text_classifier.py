"""CLIP's zero-shot classifier of a set of sentences, computed once and cached in a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cafo.encoder_spec import EncoderSpec
from cafo.prompt import zero_shot_classifier
from rayjobs.cluster.device import worker_device
from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.cluster.shared_storage import assert_shared_storage
from rayjobs.errors import ConfigError, DataError
from rayjobs.models.encoder import EncoderInfo, load_vision_encoder
from rayjobs.storage.download import cached_path
from rayjobs.storage.files import atomic_path
from rayjobs.storage.fingerprint import fingerprint


class ClassifierFile(NamedTuple):
    """A zero-shot classifier that was read from its file."""

    store: str
    """name of the file, which identifies the text encoder and the sentences"""
    weights: Tensor
    """W, (C, N) float32, columns of unit norm"""
    sentences: int
    """number of sentences that W was made of"""
    truncated: int
    """number of sentences longer than CLIP's text window, which were cut"""


def prepare_classifier(
    encoder: EncoderInfo,
    prompts: Mapping[str, Sequence[str]],
    names: Sequence[str],
    cache: Path,
    resources: Mapping[str, float],
) -> ClassifierFile:
    """Return CLIP's classifier for some sentences; a Ray task computes it unless the cache holds it.

    Args:
        encoder: the CLIP.
        prompts: {class name: sentences}.
        names: the N classes, in the order of the columns of W.
        cache: the cache folder.
        resources: what the task reserves.

    Raises:
        ConfigError: the encoder is not a CLIP.
        DataError: the file in the cache is damaged.
    """
    if not encoder.clip:
        raise ConfigError(f"{encoder.identity} has no text encoder; put a CLIP first among the encoders")
    identity = ["classifier", 1, encoder.identity, [[name, list(prompts[name])] for name in names]]
    path = cache / "classifiers" / f"{fingerprint(identity)[:20]}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        task = ray.remote(_write_classifier).options(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))
        with reraise_user_errors():
            ray.get(task.remote(path, encoder.spec, prompts, list(names), worker_device(resources)))
    try:
        with safe_open(cached_path(path), "pt") as file:
            counts = file.metadata()
            sentences, truncated = int(counts["sentences"]), int(counts["truncated"])
            return ClassifierFile(path.stem, file.get_tensor("weights"), sentences, truncated)
    except (SafetensorError, LookupError, TypeError) as error:
        raise DataError(
            f"{path} is no whole classifier file ({error}); delete it, and the next run encodes the sentences again"
        ) from error


def _write_classifier(
    path: Path, spec: EncoderSpec, prompts: Mapping[str, Sequence[str]], names: list[str], device: str
) -> None:
    from cafo.encoders import ClipEncoder

    assert_shared_storage(path.parent)
    encoder = load_vision_encoder(spec, device)
    assert isinstance(encoder, ClipEncoder)
    classifier = zero_shot_classifier(encoder, prompts, names)
    counts = {"sentences": str(classifier.sentences), "truncated": str(len(classifier.truncated))}
    with atomic_path(path) as temporary:
        save_file({"weights": classifier.weights.contiguous()}, temporary, counts)
