"""CLIP's zero-shot classifier of a set of sentences, computed once and cached in a file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cafo.encoder_spec import EncoderSpec
from cafo.prompt import sentences_by_class, zero_shot_classifier
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
    embeddings: Tensor | None = None
    """each class's sentences, (N, P, C) float32 of unit norm, as `sentences_by_class` has them; None if not wanted"""


def prepare_classifier(
    encoder: EncoderInfo,
    prompts: Mapping[str, Sequence[str]],
    names: Sequence[str],
    cache: Path,
    resources: Mapping[str, float],
    *,
    each: bool = False,
) -> ClassifierFile:
    """Return CLIP's classifier for some sentences; a Ray task computes it unless the cache holds it.

    The embeddings of the sentences are in a file of their own, because they may be a thousand times as large.

    Args:
        encoder: the CLIP.
        prompts: {class name: sentences}.
        names: the N classes, in the order of the columns of W.
        cache: the cache folder.
        resources: what the task reserves.
        each: also return the embedding of each sentence.

    Raises:
        ConfigError: the encoder is not a CLIP.
        DataError: the file in the cache is damaged.
    """
    if not encoder.clip:
        raise ConfigError(f"{encoder.identity} has no text encoder; put a CLIP first among the encoders")
    identity = ["classifier", 1, encoder.identity, [[name, list(prompts[name])] for name in names]]
    path = cache / "classifiers" / f"{fingerprint(identity)[:20]}.safetensors"
    if not path.exists() or (each and not _sentences_path(path).exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        task = ray.remote(_write_classifier).options(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))
        with reraise_user_errors():
            ray.get(task.remote(path, encoder.spec, prompts, list(names), worker_device(resources), each))
    weights, counts = _read(path, "weights")
    classifier = ClassifierFile(path.stem, weights, int(counts["sentences"]), int(counts["truncated"]))
    if not each:
        return classifier
    embeddings, counts = _read(_sentences_path(path), "embeddings")
    return classifier._replace(embeddings=sentences_by_class(embeddings, json.loads(counts["counts"])))


def _sentences_path(path: Path) -> Path:
    """Return the file of the embeddings of a classifier's sentences."""
    return path.with_name(f"{path.stem}-sentences.safetensors")


def _read(path: Path, name: str) -> tuple[Tensor, Mapping[str, str]]:
    """Read a tensor and the header of a file. Raises DataError if it is damaged."""
    try:
        with safe_open(cached_path(path), "pt") as file:
            header = file.metadata() or {}
            if lacking := {"weights": {"sentences", "truncated"}, "embeddings": {"counts"}}[name] - set(header):
                raise LookupError(f"no {', '.join(sorted(lacking))} in its header")
            return file.get_tensor(name), header
    except (SafetensorError, LookupError, TypeError) as error:
        raise DataError(
            f"{path} is no whole classifier file ({error}); delete it, and the next run encodes the sentences again"
        ) from error


def _write_classifier(
    path: Path, spec: EncoderSpec, prompts: Mapping[str, Sequence[str]], names: list[str], device: str, each: bool
) -> None:
    from cafo.encoders import ClipEncoder

    assert_shared_storage(path.parent)
    encoder = load_vision_encoder(spec, device)
    assert isinstance(encoder, ClipEncoder)
    classifier = zero_shot_classifier(encoder, prompts, names)
    counts = {"sentences": str(classifier.sentences), "truncated": str(len(classifier.truncated))}
    if each:
        with atomic_path(_sentences_path(path)) as temporary:
            header = {"counts": json.dumps(classifier.counts)}
            save_file({"embeddings": classifier.embeddings.contiguous()}, temporary, header)
    if not path.exists():
        with atomic_path(path) as temporary:
            save_file({"weights": classifier.weights.contiguous()}, temporary, counts)
