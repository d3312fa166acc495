"""An adapter in memory: take it out of a model, put it into a model, save it in this project's own format.

The own format is a safetensors file of `prompt` (L, K, C) and `gate` (L, H) in float32. An adapter that reads images
adds its projection under `vision.*`. The header states the format's version, the gate convention, the base's shape and
fingerprint, the tokenizer's hash, the template of the training, and the image encoder's identity and preprocessing.
`adapter.adapter_formats` reads this format and the foreign ones.

L adapted layers, K prompt length, C width, H query heads.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapter.adaption import TRAINED_GATES, AdaptionConfig, Gate
from adapter.atomic_file import atomic_path
from adapter.base.quantization import precision_of
from adapter.decoder import Decoder
from adapter.decoder_config import SIZES, DecoderConfig
from adapter.errors import AdapterError, CheckpointError
from adapter.image_projection import ImageProjection, ImageProjectionConfig
from adapter.templates import Template, parse_template, template_fields

FORMAT = "llama-adapter"
VERSION = 1
_VISION_KEYS = {"encoder": "tower"}
"""Field of `ImageProjectionConfig` → its key in the header, where format version 1 spells it differently."""
_TEXT_TENSORS, _PROJECTION_PREFIX = {"prompt", "gate"}, "vision."


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterFile:
    """The content of an adapter file. Tensors are float32 on the CPU."""

    prompt: Tensor
    """(L, K, C), lowest adapted layer first."""
    gate: Tensor
    """(L, H), or (L, 1) where one gate serves all heads."""
    convention: Gate
    """The function that the model applies to the gates (see `AdaptionConfig.gate`)."""
    base_shape: Mapping[str, int] = field(default_factory=dict)
    """`DecoderConfig.sizes` of the base, as far as the file states them; foreign files state few."""
    base_switches: Mapping[str, Any] | None = None
    """Settings in which the base's family differs from LLaMA (`DecoderConfig.switches`); None in foreign files."""
    base_fingerprint: str | None = None
    """`Checkpoint.fingerprint` of the base; None in foreign files."""
    base_dtype: str | None = None
    """Precision of the base in training (`adapter.base.quantization.precision_of`); None if the file does not say. The
    adapter loads on a base that is held otherwise."""
    tokenizer_sha256: str | None = None
    """SHA-256 of the tokenizer's file; None in foreign files."""
    template: Template | None = None
    """Template of the records in training; None if the file does not say."""
    format_templates: Mapping[str, Template] = field(default_factory=dict)
    """Templates of those formats of records that were trained in another template, by the format."""
    vision: ImageProjectionConfig | None = None
    """Image projection of the adapter, with the identity of its encoder; None for text alone."""
    projection: Mapping[str, Tensor] = field(default_factory=dict)
    """The tensors of `ImageProjection`, by name."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further notes, as JSON values."""

    @property
    def config(self) -> AdaptionConfig:
        """The adapter's shape."""
        n_layers, prompt_length, _ = self.prompt.shape
        return AdaptionConfig(n_layers=n_layers, prompt_length=prompt_length, gate=self.convention, vision=self.vision)

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        gates = self.gate.numel() if self.convention in TRAINED_GATES else 0
        return self.prompt.numel() + gates + sum(tensor.numel() for tensor in self.projection.values())

    def save(self, path: str | Path) -> None:
        """Write the own format. The file appears complete or not at all. Raises OSError if it cannot be written."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "gate": self.convention,
            "n_layers": str(self.config.n_layers),
            "prompt_length": str(self.config.prompt_length),
            "base_shape": json.dumps(dict(self.base_shape)),
            "base_fingerprint": self.base_fingerprint or "",
            "base_dtype": self.base_dtype or "",
            "tokenizer_sha256": self.tokenizer_sha256 or "",
            "extra": json.dumps(dict(self.extra)),
        }
        if self.template is not None:
            templates = {"": self.template, **self.format_templates}
            header["templates"] = json.dumps({name: template_fields(one) for name, one in templates.items()})
        if self.base_switches:
            header["base_switches"] = json.dumps(dict(self.base_switches))
        if self.vision is not None:
            header["vision"] = json.dumps({_VISION_KEYS.get(k, k): v for k, v in asdict(self.vision).items()})
        tensors = {"prompt": self.prompt, "gate": self.gate}
        tensors |= {_PROJECTION_PREFIX + name: tensor for name, tensor in self.projection.items()}
        with atomic_path(path) as part:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata=header)


def extract_adapter(
    model: Decoder,
    *,
    base_fingerprint: str | None = None,
    base_dtype: str | None = None,
    tokenizer_sha256: str | None = None,
    template: Template | None = None,
    format_templates: Mapping[str, Template] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> AdapterFile:
    """A copy of the model's adapter, with what identifies its base and tokenizer, and the templates of its training.

    base_dtype: how the base was held in training; by default, how this model holds it.

    Raises AdapterError if the model has no adapter.
    """
    if model.adaption_config is None:
        raise AdapterError("the model holds no adapter to save; add or load one first")
    prompt, gate, projection = copy_tensors(model.adaptions, model.vision)
    return AdapterFile(
        prompt=prompt,
        gate=gate,
        convention=model.adaption_config.gate,
        base_shape=model.config.sizes(),
        base_switches=model.config.switches(),
        base_fingerprint=base_fingerprint,
        base_dtype=base_dtype or precision_of(model),
        tokenizer_sha256=tokenizer_sha256,
        template=template,
        format_templates=format_templates or {},
        vision=model.adaption_config.vision,
        projection=projection,
        extra=extra or {},
    )


def copy_tensors(
    adaptions: Sequence[Any], projection: ImageProjection | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Copies of an adapter's tensors, as `AdapterFile` has them: prompt, gate and projection.

    adaptions: the modules with `prompt` and `gate`, lowest layer first.
    """
    prompt = torch.stack([to_float32(adaption.prompt) for adaption in adaptions])
    gate = torch.stack([to_float32(adaption.gate) for adaption in adaptions])
    tensors = {} if projection is None else projection.state_dict()
    return prompt, gate, {name: to_float32(tensor) for name, tensor in tensors.items()}


def apply_adapter(
    model: Decoder,
    file: AdapterFile,
    *,
    fingerprint: str | None = None,
    tokenizer_sha256: str | None = None,
    encoder: str | None = None,
) -> None:
    """Put a file's adapter on the model, in place of any that is there.

    fingerprint, tokenizer_sha256, encoder: identities of the base, the tokenizer and the image encoder in use. An
    identity that is not given, or that the file does not state, is not compared.

    Raises CheckpointError, and leaves the model as it was, if the adapter was made for a base of another shape, or for
    a base, tokenizer or image encoder of another identity.
    """
    check_adapter_fits(file, model.config, fingerprint=fingerprint, tokenizer_sha256=tokenizer_sha256, encoder=encoder)
    model.add_adapter(file.config)
    with torch.no_grad():
        for adaption, prompt, gate in zip(model.adaptions, file.prompt, file.gate, strict=True):
            adaption.prompt.copy_(prompt)
            adaption.gate.copy_(gate.expand_as(adaption.gate))
        if model.vision is not None:
            model.vision.load_state_dict(dict(file.projection))


def check_adapter_fits(
    file: AdapterFile,
    config: DecoderConfig,
    *,
    fingerprint: str | None = None,
    tokenizer_sha256: str | None = None,
    encoder: str | None = None,
) -> None:
    """Raise CheckpointError as `apply_adapter` does, before the base's weights are loaded.

    config: the shape of the base. Identities as in `apply_adapter`.
    """
    check_shape(file, config.sizes(), config.switches())
    check_identities(file, fingerprint, tokenizer_sha256, encoder)


def check_shape(file: AdapterFile, actual: Mapping[str, int], switches: Mapping[str, Any] | None = None) -> None:
    """Raise CheckpointError if the adapter was made for a base of another shape, or with other switches.

    actual: `DecoderConfig.sizes` of the base. switches: `DecoderConfig.switches` of the base; not
    compared if None.
    """
    n_layers, _, dim = file.prompt.shape
    expected = {"dim": dim, **file.base_shape}
    if file.gate.shape[1] != 1:
        expected["n_heads"] = file.gate.shape[1]
    if wrong := [f"{k} {value}, this base has {actual[k]}" for k, value in expected.items() if actual[k] != value]:
        raise CheckpointError(f"the adapter was made for another base: it wants {'; '.join(wrong)}")
    if switches is not None and file.base_switches is not None:
        wanted, given = (json.dumps(dict(one), sort_keys=True) for one in (file.base_switches, switches))
        if wanted != given:
            raise CheckpointError(f"the adapter was made for a base with the switches {wanted}, this base has {given}")
    if n_layers > actual["n_layers"]:
        raise CheckpointError(f"the adapter has {n_layers} layers, this base has only {actual['n_layers']}")


def check_identities(
    file: AdapterFile, fingerprint: str | None, tokenizer_sha256: str | None, encoder: str | None = None
) -> None:
    """Raise CheckpointError if the adapter was made for a base, tokenizer or image encoder of another identity.

    Identities as in `apply_adapter`.
    """
    if encoder and file.vision is None:
        raise CheckpointError("the adapter was made for text alone and cannot read images: leave out the image encoder")
    for subject, expected, actual in (
        ("base of the same shape but other weights: fingerprint", _short(file.base_fingerprint), _short(fingerprint)),
        ("tokenizer: sha256", _short(file.tokenizer_sha256), _short(tokenizer_sha256)),
        ("image encoder, preprocessing or precision:", file.vision and file.vision.encoder, encoder),
    ):
        if expected and actual and expected != actual:
            raise CheckpointError(f"the adapter was made for another {subject} {expected}, here {actual}")


def _short(digest: str | None) -> str | None:
    """The beginning of a digest: enough for a person to tell two apart."""
    return digest and f"{digest[:12]}…"


def parse_adapter(path: Path, header: dict[str, str], tensors: dict[str, Tensor]) -> AdapterFile:
    """The content of a file in the own format, given its header and tensors.

    Raises CheckpointError, naming the file, if the version is unknown, the header is damaged, or the tensors are not
    those that the header states.
    """
    if header.get("version") != str(VERSION):
        raise CheckpointError(f"{path}: format version {header.get('version')!r}; this code reads version {VERSION}")
    try:
        convention: Any = header["gate"]
        vision = _parse_vision(header["vision"]) if "vision" in header else None
        stated = (int(header["n_layers"]), int(header["prompt_length"]))
        base_shape, extra = json.loads(header["base_shape"]), json.loads(header["extra"])
        switches = json.loads(header.get("base_switches", "{}"))  # LLaMA's, where an older file says nothing
        templates = {name: parse_template(one) for name, one in json.loads(header.get("templates", "{}")).items()}
        if convention not in get_args(Gate) or not all(isinstance(x, dict) for x in (base_shape, switches, extra)):
            raise AdapterError(f"gate {convention!r}, base_shape {base_shape!r}, {switches!r}, extra {extra!r}")
        if unknown := base_shape.keys() - set(SIZES):
            raise AdapterError(f"base_shape holds {sorted(unknown)}")
    except (KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({error!r})") from error
    names = _TEXT_TENSORS | {_PROJECTION_PREFIX + name for name in _projection_shapes(vision, 1)}
    if tensors.keys() != names:
        raise CheckpointError(f"{path}: expected the tensors {', '.join(sorted(names))}; {some_keys(tensors)}")
    prompt, gate = to_float32(tensors["prompt"]), to_float32(tensors["gate"])
    if prompt.dim() != 3 or gate.dim() != 2 or stated != prompt.shape[:2] or len(gate) != len(prompt):
        raise CheckpointError(
            f"{path}: prompt {tuple(prompt.shape)} and gate {tuple(gate.shape)} are not the {stated[0]} layers of "
            f"{stated[1]} prompts that the header states"
        )
    return AdapterFile(
        prompt=prompt,
        gate=gate,
        convention=convention,
        vision=vision,
        projection=_projection_tensors(path, tensors, vision, prompt.shape[2]),
        base_shape=base_shape,
        base_switches=switches,
        base_fingerprint=header.get("base_fingerprint") or None,
        base_dtype=header.get("base_dtype") or None,
        tokenizer_sha256=header.get("tokenizer_sha256") or None,
        template=templates.pop("", None),
        format_templates=templates,
        extra=extra,
    )


def _parse_vision(header: str) -> ImageProjectionConfig:
    fields = json.loads(header)
    if not isinstance(fields, dict) or not all(isinstance(width, int) for width in fields.get("widths", [None])):
        raise AdapterError(f"vision {header}")
    names = {key: name for name, key in _VISION_KEYS.items()}
    fields = {names.get(key, key): value for key, value in fields.items()}
    try:
        return ImageProjectionConfig(**{**fields, "widths": tuple(fields["widths"])})
    except TypeError as error:
        raise AdapterError(f"vision {header}: {error}") from error


def _projection_tensors(
    path: Path, tensors: dict[str, Tensor], vision: ImageProjectionConfig | None, dim: int
) -> dict[str, Tensor]:
    """The projection's tensors by name, checked against the shapes that `vision` and the width `dim` imply."""
    projection = {}
    for name, shape in _projection_shapes(vision, dim).items():
        tensor = projection[name] = to_float32(tensors[_PROJECTION_PREFIX + name])
        if tensor.shape != shape:
            raise CheckpointError(
                f"{path}: {_PROJECTION_PREFIX}{name} has shape {tuple(tensor.shape)}, the header states {shape}"
            )
    return projection


def _projection_shapes(vision: ImageProjectionConfig | None, dim: int) -> dict[str, tuple[int, ...]]:
    if vision is None:
        return {}
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in ImageProjection(vision, dim).state_dict().items()}


def to_float32(tensor: Tensor) -> Tensor:
    """A float32 copy on the CPU, which shares no memory with a file or a model."""
    return tensor.detach().to("cpu", torch.float32, copy=True)


def some_keys(tensors: Mapping[str, Tensor]) -> str:
    """A short list of a file's tensors, for an error message."""
    return f"it holds {', '.join(list(tensors)[:3]) or 'nothing'}{', …' if len(tensors) > 3 else ''}"
