"""CLIP's zero-shot classifier of a set of sentences, computed once and cached in a file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ray
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cafo.encoder_spec import EncoderSpec
from cafo.prompt import average_sentences, encode_sentences, sentences_by_class
from rayjobs.cluster.device import worker_device
from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.cluster.shared_storage import assert_shared_storage
from rayjobs.console import Progress
from rayjobs.data.feature_encoding import encoder_threads, use_threads
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
        reserved = {"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0)}
        task = ray.remote(_write_classifier).options(num_returns="streaming", **reserved)
        total, device = sum(len(prompts[name]) for name in names), worker_device(resources)
        with reraise_user_errors(), Progress("encode", unit="sentences", total=total) as progress:
            for done in task.remote(path, encoder.spec, prompts, list(names), device, encoder_threads(1), each):
                progress.advance(ray.get(done))
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
    path: Path,
    spec: EncoderSpec,
    prompts: Mapping[str, Sequence[str]],
    names: list[str],
    device: str,
    threads: int,
    each: bool,
) -> Iterator[int]:
    """Encode the sentences and write the files; yield the number of sentences of each batch when it is encoded."""
    from cafo.encoders import ClipEncoder

    assert_shared_storage(path.parent)
    encoder = load_vision_encoder(spec, device)
    assert isinstance(encoder, ClipEncoder)
    before = torch.get_num_threads()
    embeddings: list[Tensor] = []
    use_threads(threads, device)
    try:
        for batch in encode_sentences(encoder, prompts, names):
            embeddings.append(batch)
            yield len(batch)
    finally:
        use_threads(before, device)  # Ray runs other tasks in this process
    classifier = average_sentences(encoder, prompts, names, embeddings)
    counts = {"sentences": str(classifier.sentences), "truncated": str(len(classifier.truncated))}
    if each:
        with atomic_path(_sentences_path(path)) as temporary:
            header = {"counts": json.dumps(classifier.counts)}
            save_file({"embeddings": classifier.embeddings.contiguous()}, temporary, header)
    if not path.exists():
        with atomic_path(path) as temporary:
            save_file({"weights": classifier.weights.contiguous()}, temporary, counts)
