"""Frozen towers, and the one loader of them: CLIP through open_clip, DINO and everything else through timm.

CaFo (arXiv 2303.02151), section 3.1; the several scales are those of LLaMA-Adapter (arXiv 2303.16199), section 3.3.
Each encoder owns its preprocessing (DINO fed with CLIP's normalisation is a different, worse encoder) and its
identity: a digest of weights, architecture, preprocessing and precision, so that features can be addressed by what they
are, wherever the files lie.

Weights come from files that others made: tensors are read, never objects (`weights_only=True`), every key must fit,
and an activation that does not match the weights is an error, because it would load, run, and score badly.

Legend: B images, T sentences, S side in pixels, C width of the features.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import open_clip
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cafo.encoder_spec import EncoderSpec, Precision
from cafo.encoder_weights import build_clip, clean_state, load_exactly, read_state, weight_file
from cafo.errors import CafoError
from cafo.files import read_json
from cafo.images import IMAGENET_MEAN, IMAGENET_STD, Preprocess


class Encoder(Protocol):
    """What the cache asks of an image encoder."""

    name: str
    identity: str
    """digest of weights, architecture, preprocessing and precision: equal identities give equal features"""
    width: int
    """C"""
    preprocess: Preprocess

    def encode_image(self, batch: Tensor) -> Tensor:
        """(B, 3, S, S) from `preprocess` → (B, C) float32 of unit norm."""

    def multi_scale(self, batch: Tensor, blocks: int = 4) -> list[Tensor]:
        """(B, 3, S, S) → global features at several depths, each (B, its own width) float32, not normalised."""


class TextEncoder(Protocol):
    """What the prompts ask of CLIP."""

    def encode_text(self, sentences: Sequence[str]) -> Tensor:
        """T sentences → (T, C) float32 of unit norm."""

    def is_truncated(self, sentence: str) -> bool:
        """Whether the sentence is longer than the text window."""


def load_encoder(spec: EncoderSpec, device: str | torch.device = "cpu") -> ClipEncoder | ImageEncoder:
    """Load one frozen tower.

    Raises:
        ValueError: unknown names, missing files, keys that do not fit, an activation that does not match the weights.
    """
    if spec.precision not in ("fp32", "bf16"):
        raise CafoError(f"precision {spec.precision!r} is not fp32 or bf16")
    if spec.kind == "pixels":
        return _pixels(spec.name, spec.precision, device)
    if not spec.weights and spec.kind in ("clip", "dino", "timm"):
        raise CafoError(f"an encoder of kind {spec.kind} needs weights: a file, a folder, or random:SEED")
    if spec.kind == "clip":
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
    if spec.kind not in ("dino", "timm"):
        raise CafoError(f"encoder kind {spec.kind!r} is not clip, dino, timm or pixels")
    folder = next((path for path in (spec.weights, spec.name) if path and (Path(path) / "config.json").is_file()), "")
    name = architecture = spec.name or ("resnet50" if spec.kind == "dino" and not folder else "")
    tower = _build_timm(f"local-dir:{folder}" if folder else name, spec.weights)
    if folder:
        built = read_json(Path(folder) / "config.json", "give a folder in timm's format")
        name = name if name and name != folder else built["architecture"]
        shape = {key: built.get(key) for key in ("architecture", "model_args", "global_pool")}
        architecture = json.dumps(shape, sort_keys=True)
        preprocess = _timm_preprocess(tower)
    elif spec.kind == "dino" and not isinstance(tower, timm.models.VisionTransformer):
        # DINO's own evaluation: shorter side 256, crop 224, whatever timm's recipe for the same architecture is.
        preprocess = Preprocess(size=224, resize=256, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    else:
        preprocess = _timm_preprocess(tower)
    return ImageEncoder(
        tower,
        name=f"{spec.kind}-{name}",
        architecture=architecture,
        preprocess=preprocess,
        precision=spec.precision,
        device=device,
    )


class ImageEncoder:
    """A frozen image tower, (B, 3, S, S) → (B, C), as an `Encoder`; a map that is not pooled is read as a whole.

    `name` is what it is called; `architecture`, the name by default, is what weights do not tell: heads, activation.
    """

    def __init__(
        self,
        tower: nn.Module,
        *,
        name: str,
        architecture: str = "",
        preprocess: Preprocess,
        precision: Precision = "fp32",
        device: str | torch.device = "cpu",
    ) -> None:
        self.name, self.preprocess = name, preprocess
        self.identity = encoder_identity(architecture or name, tower, preprocess, precision)
        self.tower = _frozen(tower, precision, device)
        side = preprocess.size
        self.width = self.encode_image(torch.zeros(1, 3, side, side), check=False).shape[1]

    @torch.no_grad()
    def encode_image(self, batch: Tensor, *, check: bool = True) -> Tensor:
        """(B, 3, S, S) → (B, C) float32 of unit norm.

        Raises:
            ValueError: features that are not finite, with the images' places in the batch.
        """
        features = F.normalize(self.tower(_like(batch, self.tower)).flatten(1).float(), dim=-1)
        if check:
            self._check(features)
        return features

    @torch.no_grad()
    def multi_scale(self, batch: Tensor, blocks: int = 4) -> list[Tensor]:
        """LLaMA-Adapter's global features, float32.

        A ViT gives its class token after `blocks` evenly spaced blocks; a convolutional tower gives the mean of every
        stage's map, and its final embedding.

        Raises:
            ValueError: more blocks than the ViT has, a tower of one's own without `forward_intermediates`, or features
                that are not finite, with the images' places in the batch.
        """
        features = [feature.float() for feature in _scales(self.tower, _like(batch, self.tower), blocks)]
        self._check(torch.cat(features, dim=1))
        return features

    def _check(self, features: Tensor) -> None:
        if not (finite := features.isfinite().all(dim=-1)).all():
            bad = (~finite).nonzero()[:, 0].tolist()
            raise CafoError(f"{self.name} gives features that are not finite for images {bad[:10]} of the batch")


class ClipEncoder(ImageEncoder):
    """CLIP's two frozen towers: an `Encoder` that is also a `TextEncoder`."""

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
        self.identity = identity  # of both towers: the classifier depends on the text tower too
        self.model, self.tokenizer = _frozen(model, precision, device), tokenizer

    @torch.no_grad()
    def encode_text(self, sentences: Sequence[str]) -> Tensor:
        """T sentences → (T, C) float32 of unit norm; those over the window are cut, as CLIP cuts them."""
        tokens = self.tokenizer(list(sentences)).to(next(self.model.parameters()).device)
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)  # type: ignore[operator]

    def is_truncated(self, sentence: str) -> bool:
        """Whether the sentence with its two end marks is longer than the text window (77 in CLIP)."""
        window = self.tokenizer.context_length
        if isinstance(self.tokenizer, open_clip.SimpleTokenizer):
            return len(self.tokenizer.encode(sentence)) + 2 > window
        return len(self.tokenizer.tokenizer(sentence)["input_ids"]) > window


def encoder_identity(architecture: str, module: nn.Module, preprocess: Preprocess, precision: str) -> str:
    """A digest of a tower's tensors and all that its features depend on, independent of the file they came in and of
    what it is called."""
    digest = hashlib.sha256(repr((architecture, preprocess, precision)).encode())
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"{type(module).__name__}-{digest.hexdigest()[:16]}"


def _frozen(module: nn.Module, precision: str, device: str | torch.device) -> nn.Module:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return module.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _like(batch: Tensor, module: nn.Module) -> Tensor:
    weight = next(module.parameters(), batch)  # pixels have none
    return batch.to(device=weight.device, dtype=weight.dtype)


def _scales(tower: Any, batch: Tensor, blocks: int) -> list[Tensor]:
    if isinstance(tower, open_clip.timm_model.TimmModel):
        tower = tower.trunk
    if isinstance(tower, open_clip.transformer.VisionTransformer):
        taken = tower.forward_intermediates(
            batch,
            indices=_evenly(blocks, tower.transformer.layers),
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        return [prefix[:, 0] for prefix in taken["image_intermediates_prefix"]]
    if isinstance(tower, open_clip.modified_resnet.ModifiedResNet):
        taken = tower.forward_intermediates(batch, indices=[1, 2, 3, 4])  # 0 is the stem
        return [m.mean(dim=(2, 3)) for m in taken["image_intermediates"]] + [taken["image_features"]]
    if isinstance(tower, timm.models.VisionTransformer):
        pairs: Any = tower.forward_intermediates(
            batch,
            indices=_evenly(blocks, len(tower.blocks)),
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return [prefix[:, 0] if tower.num_prefix_tokens else patches.mean(dim=1) for patches, prefix in pairs]
    if not hasattr(tower, "forward_intermediates"):
        raise CafoError(f"{type(tower).__name__} has no `forward_intermediates`, so no features at several scales")
    final, maps = tower.forward_intermediates(batch, output_fmt="NCHW")
    stages = maps[1:] if isinstance(tower, timm.models.ResNet) else maps  # a ResNet's first map is its stem
    return [m.mean(dim=(2, 3)) for m in stages] + [tower.forward_head(final).flatten(1)]


def _evenly(blocks: int, depth: int) -> list[int]:
    """Block numbers, the last included: 4 of 12 → 2, 5, 8, 11."""
    if not 1 <= blocks <= depth:
        raise CafoError(f"cannot take {blocks} blocks of a tower with {depth}")
    return [round((i + 1) * depth / blocks) - 1 for i in range(blocks)]


def _pixels(side: str, precision: Precision, device: str | torch.device) -> ImageEncoder:
    if not side.isdecimal() or not int(side):
        raise CafoError(f"an encoder of kind pixels has its side for a name, such as 8, got {side!r}")
    plain = Preprocess(size=int(side), resize=int(side), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return ImageEncoder(nn.Flatten(), name=f"pixels-{side}", preprocess=plain, precision=precision, device=device)


def _build_timm(name: str, weights: str) -> nn.Module:
    if not name.startswith("local-dir:") and not timm.is_model(name):
        raise CafoError(f"timm has no architecture {name!r}; `timm.list_models()` lists them")
    seed = weights.removeprefix("random:") if weights.startswith("random:") else ""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed or 0))
        try:
            tower = timm.create_model(name, pretrained=False, num_classes=0)
        except (KeyError, TypeError, RuntimeError) as error:
            raise CafoError(f"timm cannot build {name} ({str(error).splitlines()[0]})") from error
    if seed:
        return tower
    path = weight_file(Path(weights))
    state = clean_state(read_state(path), heads=True)
    # timm converts the official spelling of some families, DINOv2's among them, to its own
    if convert := getattr(sys.modules[type(tower).__module__], "checkpoint_filter_fn", None):
        state = convert(state, tower)
    load_exactly(tower, state, path)
    return tower


def _timm_preprocess(tower: nn.Module) -> Preprocess:
    data = timm.data.resolve_model_data_config(tower)
    size = data["input_size"][-1]
    return Preprocess(
        size=size,
        resize=int(size / data["crop_pct"]),
        mode="squash" if data["crop_mode"] == "squash" else "shortest",
        interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )
