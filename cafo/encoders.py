"""Load frozen image and text encoders: CLIP through open_clip, DINO and all others through timm.

CaFo (arXiv 2303.02151), section 3.1. Features at several scales are those of LLaMA-Adapter (arXiv 2303.16199), section
3.3. Each encoder has its own preprocessing, since DINO with CLIP's normalisation gives worse features. The identity of
an encoder is a digest of weights, architecture, preprocessing and precision, so that stored features are found again by
content, wherever the weight file lies.

Weight files are read as tensors only (`weights_only=True`), every key must fit, and an activation that does not match
the weights is an error, because it would load and run but score badly.

Legend: B images, T sentences, S side in pixels, C width of the features.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import open_clip
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cafo.bounded_build import Bounds, build_within, check_side
from cafo.clip_projection import split_projection
from cafo.encoder_spec import EncoderSpec, Precision
from cafo.encoder_weights import build_clip, clean_state, load_state, read_state, weight_file
from cafo.errors import CafoError, EncoderError, refuse_text
from cafo.files import read_json
from cafo.images import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from cafo.methods.base import Projection
from cafo.multi_scale import multi_scale_features

LARGE_SIDE = 64
"""Side in pixels from which the layout of images in memory is chosen for speed."""


class Encoder(Protocol):
    """An image encoder, as the cache uses it."""

    name: str
    identity: str
    """digest of weights, architecture, preprocessing and precision; encoders of equal identity give equal features"""
    width: int
    """C"""
    preprocess: Preprocess

    def encode_image(self, batch: Tensor) -> Tensor:
        """Encode preprocessed images: (B, 3, S, S) → (B, C) float32 of unit norm."""

    def multi_scale(self, batch: Tensor, blocks: int = 4) -> list[Tensor]:
        """Return global features at several depths, each (B, own width) float32, not normalised."""


class TextEncoder(Protocol):
    """A text encoder, as the prompts use it."""

    def encode_text(self, sentences: Sequence[str]) -> Tensor:
        """Encode T sentences: (T, C) float32 of unit norm."""

    def is_truncated(self, sentence: str) -> bool:
        """Return whether a sentence is longer than the text window."""


def load_encoder(spec: EncoderSpec, device: str | torch.device = "cpu") -> ClipEncoder | ImageEncoder:
    """Load a frozen encoder.

    Raises:
        EncoderError: an unknown name, a missing file, tensors that do not fit, or another activation than the weights
            were trained with.
    """
    if spec.precision not in ("fp32", "bf16"):
        raise EncoderError(f"precision {spec.precision!r} is not fp32 or bf16")
    if spec.kind not in ("clip", "dino", "timm", "pixels"):
        raise EncoderError(f"encoder kind {spec.kind!r} is not clip, dino, timm or pixels")
    if spec.kind == "pixels":
        return _load_pixels(spec.name, spec.precision, device)
    if not spec.weights:
        raise EncoderError(f"an encoder of kind {spec.kind} needs weights: a file, a folder, or random:SEED")
    if spec.kind == "clip":
        return _load_clip(spec, device)
    return _load_timm(spec, device)


def _load_clip(spec: EncoderSpec, device: str | torch.device) -> ClipEncoder:
    built = build_clip(spec.name, spec.weights, spec.config, spec.quick_gelu)
    return ClipEncoder(
        built.model,
        built.tokenizer,
        name=built.name,
        architecture=built.architecture,
        preprocess=built.preprocess,
        precision=spec.precision,
        device=device,
    )


def _load_timm(spec: EncoderSpec, device: str | torch.device) -> ImageEncoder:
    """Load a timm architecture, or one from a folder in timm's format; DINO is a timm architecture too."""
    folder = next((path for path in (spec.weights, spec.name) if path and (Path(path) / "config.json").is_file()), "")
    if not folder:
        return _load_timm_architecture(spec, device)
    config = Path(folder) / "config.json"
    try:
        return _load_timm_folder(spec, config, device)
    except Exception as error:  # timm takes the values of a config as they are, so that any error may come of them
        if isinstance(error, CafoError | OSError):
            raise
        raise EncoderError(
            f"{config} describes no encoder that timm can build ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); restore it, or give the one of these weights"
        ) from error


def _load_timm_architecture(spec: EncoderSpec, device: str | torch.device) -> ImageEncoder:
    name = spec.name or ("resnet50" if spec.kind == "dino" else "")
    network = _build_timm(name, spec.weights)
    if spec.kind == "dino" and not isinstance(network, timm.models.VisionTransformer):
        # DINO's own evaluation resizes to 256 and crops 224, whatever timm does for the same architecture.
        preprocess = Preprocess(size=224, resize=256, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    else:
        preprocess = _timm_preprocess(network)
    return ImageEncoder(
        network,
        name=f"{spec.kind}-{name}",
        architecture=name,
        preprocess=preprocess,
        precision=spec.precision,
        device=device,
    )


def _load_timm_folder(spec: EncoderSpec, config: Path, device: str | torch.device) -> ImageEncoder:
    content, folder = read_json(config, "give a folder in timm's format"), str(config.parent)
    network = _build_timm(f"local-dir:{folder}", spec.weights, config)
    name = spec.name if spec.name and Path(spec.name) != config.parent else content["architecture"]
    shape = {key: content.get(key) for key in ("architecture", "model_args", "global_pool")}
    preprocess = _timm_preprocess(network)
    check_side(preprocess.size, str(config))
    return ImageEncoder(
        network,
        name=f"{spec.kind}-{name}",
        architecture=json.dumps(shape, sort_keys=True),
        preprocess=preprocess,
        precision=spec.precision,
        device=device,
    )


class ImageEncoder:
    """A frozen image network as an `Encoder`; a feature map that the network does not pool is flattened.

    Args:
        network: (B, 3, S, S) → (B, C), or a map (B, …) with C elements for each image.
        name: name of the encoder in messages.
        architecture: what the weights do not tell, such as heads and activation; by default the name.
        preprocess: how images are prepared.
        precision: type of the weights; features are always float32.
        device: where it runs.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        architecture: str = "",
        preprocess: Preprocess,
        precision: Precision = "fp32",
        device: str | torch.device = "cpu",
    ) -> None:
        self.name, self.preprocess = name, preprocess
        self.identity = encoder_identity(architecture or name, network, preprocess, precision)
        side = preprocess.size
        self._layout = _choose_layout(network, side, device)
        self.network = _freeze(network, precision, device, self._layout)
        self.width = self.encode_image(torch.zeros(1, 3, side, side), check=False).shape[1]

    @torch.no_grad()
    def encode_image(self, batch: Tensor, *, check: bool = True) -> Tensor:
        """Encode preprocessed images: (B, 3, S, S) → (B, C) float32 of unit norm.

        Raises:
            EncoderError: features that are not finite, unless `check` is false.
        """
        features = F.normalize(self.network(self._prepare(batch)).flatten(1).float(), dim=-1)
        if check:
            self._check_finite(features)
        return features

    @torch.no_grad()
    def multi_scale(self, batch: Tensor, blocks: int = 4) -> list[Tensor]:
        """Return LLaMA-Adapter's global features of (B, 3, S, S), each (B, own width) float32.

        A ViT gives its class token after `blocks` evenly spaced blocks. A convolutional network gives the mean of every
        stage's feature map, and its final embedding.

        Raises:
            EncoderError: more blocks than the ViT has, a network without `forward_intermediates`, or features that are
                not finite.
        """
        scales = multi_scale_features(self.network, self._prepare(batch), blocks)
        features = [feature.float() for feature in scales]
        self._check_finite(torch.cat(features, dim=1))
        return features

    def _prepare(self, batch: Tensor) -> Tensor:
        """Move a batch to the device, the type and the layout of the weights."""
        weight = next(self.network.parameters(), batch)  # an encoder of kind pixels has no weights
        return batch.to(device=weight.device, dtype=weight.dtype, memory_format=self._layout)

    def _check_finite(self, features: Tensor) -> None:
        if not (finite := features.isfinite().all(dim=-1)).all():
            rows = (~finite).nonzero()[:, 0].tolist()
            raise EncoderError(f"{self.name} gives features that are not finite for images {rows[:10]} of the batch")


class ClipEncoder(ImageEncoder):
    """CLIP's frozen image and text encoders: an `Encoder` that is also a `TextEncoder`."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str,
        architecture: str,
        preprocess: Preprocess,
        precision: Precision = "fp32",
        device: str | torch.device = "cpu",
    ) -> None:
        identity = encoder_identity(architecture, model, preprocess, precision)
        super().__init__(model.visual, name=name, preprocess=preprocess, precision=precision, device=device)  # type: ignore[arg-type]
        self.identity = identity  # of image and text encoder, since the classifier depends on both
        self.model, self.tokenizer = _freeze(model, precision, device, self._layout), tokenizer

    @torch.no_grad()
    def encode_text(self, sentences: Sequence[str]) -> Tensor:
        """Encode T sentences: (T, C) float32 of unit norm. Those longer than the text window are cut, as in CLIP."""
        refuse_text(sentences, "sentences")
        tokens = self.tokenizer(list(sentences)).to(next(self.model.parameters()).device)
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)  # type: ignore[operator]

    @property
    def projection(self) -> Projection:
        """The last layer of the image encoder, in float32 on the CPU.

        Raises:
            EncoderError: the image encoder does not end with one linear layer.
        """
        _, (weight, bias) = self._split
        return Projection(weight.float().cpu(), None if bias is None else bias.float().cpu())

    @torch.no_grad()
    def encode_unprojected(self, batch: Tensor) -> Tensor:
        """Return what `projection` makes the embeddings of: (B, 3, S, S) → (B, E) float32, of any length.

        Raises:
            EncoderError: the image encoder does not end with one linear layer, or features are not finite.
        """
        network, _ = self._split
        features = network(self._prepare(batch)).flatten(1).float()
        self._check_finite(features)
        return features

    @cached_property
    def _split(self) -> tuple[nn.Module, Projection]:
        return split_projection(self.network)

    def is_truncated(self, sentence: str) -> bool:
        """Return whether a sentence with its start and end token is longer than the text window (77 in CLIP)."""
        window = self.tokenizer.context_length
        if isinstance(self.tokenizer, open_clip.SimpleTokenizer):
            return len(self.tokenizer.encode(sentence)) + 2 > window
        return len(self.tokenizer.tokenizer(sentence)["input_ids"]) > window


def encoder_identity(architecture: str, module: nn.Module, preprocess: Preprocess, precision: str) -> str:
    """Return a digest of weights, architecture, preprocessing and precision: all that an encoder's features depend on.

    The digest does not depend on the name or the file of the encoder.
    """
    digest = hashlib.sha256(repr((architecture, preprocess, precision)).encode())
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"{type(module).__name__}-{digest.hexdigest()[:16]}"


def _freeze(module: nn.Module, precision: str, device: str | torch.device, layout: torch.memory_format) -> nn.Module:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    frozen = module.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return frozen.to(memory_format=layout)


def _choose_layout(module: nn.Module, side: int, device: str | torch.device) -> torch.memory_format:
    """Return how images and kernels lie in memory: channels last where that is faster.

    It is faster for convolutions on a CPU, which then need no copies between their own layout and another. A
    transformer has one convolution only. Small images are fast as they are, and keep the last bits of their features.
    """
    convolutions = sum(isinstance(part, nn.Conv2d) for part in module.modules())
    faster = torch.device(device).type == "cpu" and convolutions > 1 and side >= LARGE_SIDE
    return torch.channels_last if faster else torch.contiguous_format


def _load_pixels(side: str, precision: Precision, device: str | torch.device) -> ImageEncoder:
    if not side.isdecimal() or not int(side):
        raise EncoderError(f"an encoder of kind pixels has its side for a name, in pixels, such as 8; got {side!r}")
    check_side(int(side), "an encoder of kind pixels")
    preprocess = Preprocess(size=int(side), resize=int(side), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return ImageEncoder(nn.Flatten(), name=f"pixels-{side}", preprocess=preprocess, precision=precision, device=device)


def _build_timm(name: str, weights: str, config: Path | None = None) -> nn.Module:
    """Build a network and load its weights. config: the JSON that describes it; None of an architecture of timm."""
    if config is None and not timm.is_model(name):
        raise EncoderError(f"timm has no architecture {name!r}; `timm.list_models()` lists them")
    seed = weights.removeprefix("random:") if weights.startswith("random:") else ""
    path = Path(weights) if seed else weight_file(Path(weights))
    state = None if seed else clean_state(read_state(path), heads=True)

    def make() -> nn.Module:
        torch.manual_seed(int(seed or 0))
        return timm.create_model(name, pretrained=False, num_classes=0)

    with torch.random.fork_rng(devices=[]):
        try:
            network = make() if config is None else build_within(make, Bounds.of(config, state, path))
        except (KeyError, TypeError, RuntimeError) as error:
            if config is not None:
                raise
            raise EncoderError(f"timm cannot build {name} ({' '.join(str(error).split())})") from error
    if state is None:
        return network
    # timm converts the official spelling of some families, DINOv2's among them, to its own
    if convert := getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None):
        state = convert(state, network)
    load_state(network, state, path)
    return network


def _timm_preprocess(network: nn.Module) -> Preprocess:
    data = timm.data.resolve_model_data_config(network)
    size = data["input_size"][-1]
    return Preprocess(
        size=size,
        resize=int(size / data["crop_pct"]),
        mode="squash" if data["crop_mode"] == "squash" else "shortest",
        interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )
