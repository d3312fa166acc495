"""Export a classifier as one ONNX graph: from preprocessed images through encoders and cache to probabilities.

Inputs    `pixels`, or `pixels_<encoder>` for each distinct preprocessing: (B, 3, S, S) float32, as `Preprocess` gives
Outputs   `logits` of eq. 9, (B, N) float32; `probabilities`, calibrated as those of `CaFo.predict`
Metadata  `class_names`, a JSON list; `preprocess`, JSON of {input: the fields of its `Preprocess`}

Encoders that the ensemble leaves out are not in the graph. It calls the same functions as `Cache.logits`, and is
compared with the classifier in onnxruntime before the file is written.

Legend: B images, C width of a source's features, M keys, N classes, S side of an encoder's images.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cafo.cache import Cache, affinity, combine_affinities, zero_shot_logits
from cafo.encoders import ImageEncoder
from cafo.errors import CafoError, EncoderError
from cafo.files import atomic_path
from cafo.images import Preprocess
from cafo.prediction import used_encoders, used_part

LARGEST_DIFFERENCE = 1e-4
"""between a probability of the graph and of the classifier"""
_ONE_FILE_BYTES = 2 * 10**9
"""size that a file of protocol buffers may have"""
_OPERATOR = re.compile(r"op='([\w.:]+)'")


class _Tower(nn.Module):
    """An encoder's network with its features scaled to unit norm: (B, 3, S, S) → (B, C)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.network(pixels).flatten(1), dim=-1)


class _Classifier(nn.Module):
    """Encoders and cache as one module: (B, 3, S, S) for each input → logits and probabilities (B, N)."""

    def __init__(self, cache: Cache, towers: Mapping[str, _Tower], input_of: Mapping[str, int]) -> None:
        super().__init__()
        self.names, self.input_of = list(towers), dict(input_of)
        self.towers = nn.ModuleList(towers.values())
        self.sources = list(cache.keys)
        self.keys = nn.ParameterList([nn.Parameter(k, requires_grad=False) for k in cache.keys.values()])
        self.labels = nn.Parameter(cache.labels, requires_grad=False)
        self.weights = nn.Parameter(cache.classifier, requires_grad=False)
        self.zero_shot_source, self.ensemble = cache.zero_shot_source, cache.ensemble
        self.alpha, self.beta = cache.alpha, cache.beta
        self.temperature = 1.0 if cache.calibration is None else cache.calibration.temperature

    def forward(self, *pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = {
            name: tower(pixels[self.input_of[name]]) for name, tower in zip(self.names, self.towers, strict=True)
        }
        zero_shot = zero_shot_logits(features[self.zero_shot_source], self.weights)
        affinities = {n: affinity(k, features[n]) for n, k in zip(self.sources, self.keys, strict=True)}
        logits = combine_affinities(zero_shot, affinities, self.labels, self.beta, self.ensemble).logits(self.alpha)
        return logits, torch.softmax(logits / self.temperature, dim=-1)


@torch.no_grad()
def export_onnx(cache: Cache, encoders: Mapping[str, ImageEncoder], path: str | Path) -> float:
    """Write a classifier as one ONNX file, for any number of images.

    Args:
        cache: the classifier.
        encoders: its encoders by name, in float32.
        path: the file.

    Returns:
        The largest difference between a probability of the graph, in onnxruntime, and of the classifier.

    Raises:
        CafoError: the extra `onnx` is not installed, or the graph is too large for one file.
        EncoderError: an encoder in bf16, or one with an operator that ONNX lacks, which the message names.
    """
    cache = used_part(cache)
    used = {name: encoders[name] for name in used_encoders(cache)}
    onnxruntime = _import_onnxruntime()
    for name, encoder in used.items():
        if any(p.dtype != torch.float32 for p in encoder.network.parameters()):
            raise EncoderError(f"{name} is in bf16, which ONNX runs in other steps: fit with precision fp32 to export")
    inputs = _name_inputs(used)
    kinds = list(inputs.values())
    towers = {name: _Tower(copy.deepcopy(encoder.network).cpu()) for name, encoder in used.items()}
    input_of = {name: kinds.index(encoder.preprocess) for name, encoder in used.items()}
    model = _Classifier(_on_cpu(cache), towers, input_of).eval()
    if (size := sum(p.numel() * p.element_size() for p in model.parameters())) > _ONE_FILE_BYTES:
        raise CafoError(f"the graph has {size:,} bytes of weights, and one ONNX file holds {_ONE_FILE_BYTES:,}")
    rng = torch.Generator().manual_seed(0)
    images = [tuple(torch.randn(n, 3, kind.size, kind.size, generator=rng) for kind in kinds) for n in (2, 3)]
    try:
        program = _convert(model, images[0], list(inputs))
    except Exception as error:  # the exporter raises what it happens to meet
        raise EncoderError(_explain(error, towers, used)) from error
    program.model.metadata_props["class_names"] = json.dumps(cache.class_names)
    program.model.metadata_props["preprocess"] = json.dumps({name: asdict(kind) for name, kind in inputs.items()})
    with atomic_path(path) as temporary:
        program.save(str(temporary), external_data=False)
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        differences = [_difference(session, model, pixels) for pixels in images]
        if not max(differences) <= LARGEST_DIFFERENCE:
            raise EncoderError(
                f"{path} was not written: its probabilities differ from the classifier's by {max(differences):.1e}"
            )
    return max(differences)


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - which torch.onnx imports in its turn
    except ImportError as error:
        raise CafoError(f'{error.name} is not installed, which ONNX needs: pip install "rayjobs[onnx]"') from error
    return onnxruntime


def _on_cpu(cache: Cache) -> Cache:
    keys = {name: k.float().cpu() for name, k in cache.keys.items()}
    changed = {"keys": keys, "labels": cache.labels.cpu(), "classifier": cache.classifier.float().cpu()}
    return Cache(**{**vars(cache), **changed})


def _name_inputs(encoders: Mapping[str, ImageEncoder]) -> dict[str, Preprocess]:
    """Return the graph's inputs by name: one for each distinct preprocessing, named after its first encoder."""
    first: dict[Preprocess, str] = {}
    for name, encoder in encoders.items():
        first.setdefault(encoder.preprocess, name)
    return {"pixels" if len(first) == 1 else f"pixels_{name}": kind for kind, name in first.items()}


def _convert(model: nn.Module, images: tuple[Tensor, ...], inputs: list[str]) -> Any:
    """Convert a module, whose inputs have any number of images, to an ONNX program."""
    batch = torch.export.Dim("images")
    with _quiet():
        return torch.onnx.export(
            model,
            images,
            dynamo=True,
            verbose=False,
            input_names=inputs,
            output_names=["logits", "probabilities"] if isinstance(model, _Classifier) else ["features"],
            dynamic_shapes=(tuple({0: batch} for _ in images),) if isinstance(model, _Classifier) else ({0: batch},),
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes on its own steps from the terminal."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def _difference(session: Any, model: nn.Module, images: tuple[Tensor, ...]) -> float:
    feed = {given.name: pixels.numpy() for given, pixels in zip(session.get_inputs(), images, strict=True)}
    _, got = session.run(["logits", "probabilities"], feed)
    return float((torch.from_numpy(got) - model(*images)[1]).abs().max())


def _explain(error: BaseException, towers: Mapping[str, _Tower], encoders: Mapping[str, ImageEncoder]) -> str:
    """Return which encoder cannot be exported and for which operator, by exporting each alone."""
    for name, tower in towers.items():
        side = encoders[name].preprocess.size
        try:
            _convert(tower, (torch.zeros(2, 3, side, side),), ["pixels"])
        except Exception as own:
            return f"encoder {name} cannot be exported to ONNX: {_reason(own)}"
    return f"the classifier cannot be exported to ONNX: {_reason(error)}"


def _reason(error: BaseException) -> str:
    """Return the operator that ONNX lacks, or else the first line of the innermost error."""
    innermost: BaseException = error
    while True:
        if operator := _OPERATOR.search(str(innermost)):
            return f"it has no operator for {operator[1]}"
        if innermost.__cause__ is None:
            return f"{type(innermost).__name__}: {(str(innermost).splitlines() or [''])[0]}"
        innermost = innermost.__cause__
