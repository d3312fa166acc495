"""An adapter in memory: take it out of a model, put it into a model, save it in this project's own format.

The own format is a safetensors file in float32. Adapters of prompts are `prompt` (L, K, C) and `gate` (L, H), and those
that read images add their projection under `vision.*`; every other method saves its tensors under the decoder's
parameter names. The header states the format's version, the method and its settings, the base's shape and fingerprint,
the tokenizer's hash, the template of the training, and the image encoder's identity and preprocessing.
`adapter.adapter_header` reads this format and `adapter.adapter_formats` the foreign ones.

L adapted layers, K prompt length, C width, H query heads.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adapter.atomic_file import atomic_path
from adapter.base.binding import meta_decoder
from adapter.base.quantization import precision_of
from adapter.decoder import Decoder
from adapter.decoder_config import DecoderConfig
from adapter.errors import AdapterError, CheckpointError
from adapter.image_projection import ImageProjectionConfig
from adapter.methods.base import AdapterMethod
from adapter.templates import Template, template_fields

FORMAT = "llama-adapter"
PROMPT_VERSION, VERSION = 1, 2
"""Versions of the format: the first is of prompts alone, the second of every other method."""
VISION_KEYS = {"encoder": "tower"}
"""Field of `ImageProjectionConfig` → its key in the header, where the format spells it differently."""
PROJECTION_PREFIX = "vision."


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterFile:
    """The content of an adapter file. Tensors are float32 on the CPU."""

    config: AdapterMethod
    """The method and its settings."""
    tensors: Mapping[str, Tensor]
    """The adapter's tensors, as `AdapterMethod.pack` lays them out: those of prompts are `prompt` (L, K, C), lowest
    adapted layer first, `gate` (L, H), or (L, 1) where one gate serves all heads, and `vision.*`."""
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
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further notes, as JSON values."""

    @property
    def prompt(self) -> Tensor:
        """The prompts (L, K, C) of an adapter of prompts alone."""
        return self.tensors["prompt"]

    @property
    def gate(self) -> Tensor:
        """The gates (L, H), or (L, 1), of an adapter of prompts alone."""
        return self.tensors["gate"]

    @property
    def vision(self) -> ImageProjectionConfig | None:
        """Image projection of the adapter, with the identity of its encoder; None for text alone."""
        return self.config.vision

    @property
    def projection(self) -> dict[str, Tensor]:
        """The tensors of `ImageProjection`, by name."""
        return {
            name.removeprefix(PROJECTION_PREFIX): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(PROJECTION_PREFIX)
        }

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(one.numel() for name, one in self.tensors.items() if name not in self.config.untrained_tensors)

    def save(self, path: str | Path) -> None:
        """Write the own format. The file appears complete or not at all. Raises OSError if it cannot be written."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {
            "format": FORMAT,
            "version": str(VERSION if "method" in self.config.header() else PROMPT_VERSION),
            **self.config.header(),
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
            header["vision"] = json.dumps({VISION_KEYS.get(k, k): v for k, v in asdict(self.vision).items()})
        with atomic_path(path) as part:
            save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, part, metadata=header)


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
    if model.adapter is None:
        raise AdapterError("the model holds no adapter to save; add or load one first")
    return AdapterFile(
        config=model.adapter,
        tensors=model.adapter.pack({name: to_float32(one) for name, one in model.adapter_parameters()}),
        base_shape=model.config.sizes(),
        base_switches=model.config.switches(),
        base_fingerprint=base_fingerprint,
        base_dtype=base_dtype or precision_of(model),
        tokenizer_sha256=tokenizer_sha256,
        template=template,
        format_templates=format_templates or {},
        extra=extra or {},
    )


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
    if file.config.trains_base and (precision := precision_of(model)) in ("int8", "nf4"):
        raise CheckpointError(
            f"the adapter is all weights of its base, which a base in {precision} cannot take: hold it in fp32 or bf16"
        )
    model.add_adapter(file.config)
    put_tensors(model, file.config.unpack(file.tensors, model.config))


@torch.no_grad()
def put_tensors(model: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Set the model's parameters of these names. One without memory (on the meta device) becomes the tensor itself."""
    for name, tensor in tensors.items():
        parameter = model.get_parameter(name)
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
        else:
            parameter.copy_(tensor)
    model.tie()


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
    check_tensors(file, meta_decoder(config, file.config))


def check_tensors(file: AdapterFile, model: Decoder) -> None:
    """Raise CheckpointError unless the file's tensors are those of a decoder that holds an adapter of its method."""
    wanted = {name: tuple(parameter.shape) for name, parameter in model.adapter_parameters()}
    given = {name: tuple(tensor.shape) for name, tensor in file.config.unpack(file.tensors, model.config).items()}
    if wrong := sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name)):
        name = wrong[0]
        raise CheckpointError(
            f"the adapter is no {file.config.method} of this base: {name} should have the shape "
            f"{wanted.get(name, 'of nothing')} and has {given.get(name, 'none')}"
        )


def check_shape(file: AdapterFile, actual: Mapping[str, int], switches: Mapping[str, Any] | None = None) -> None:
    """Raise CheckpointError if the adapter was made for a base of another shape, or with other switches.

    actual: `DecoderConfig.sizes` of the base. switches: `DecoderConfig.switches` of the base; not
    compared if None.
    """
    implied = file.config.sizes(file.tensors) if file.tensors else {}  # of a header alone, only what it states
    expected = {**implied, **file.base_shape}
    if wrong := [f"{k} {value}, this base has {actual[k]}" for k, value in expected.items() if actual[k] != value]:
        raise CheckpointError(f"the adapter was made for another base: it wants {'; '.join(wrong)}")
    if switches is not None and file.base_switches is not None:
        wanted, given = (json.dumps(dict(one), sort_keys=True) for one in (file.base_switches, switches))
        if wanted != given:
            raise CheckpointError(f"the adapter was made for a base with the switches {wanted}, this base has {given}")
    if (n_layers := file.config.n_layers or 0) > actual["n_layers"]:
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


def to_float32(tensor: Tensor) -> Tensor:
    """A float32 copy on the CPU, which shares no memory with a file or a model."""
    return tensor.detach().to("cpu", torch.float32, copy=True)


def some_keys(tensors: Mapping[str, Tensor]) -> str:
    """A short list of a file's tensors, for an error message."""
    return f"it holds {', '.join(list(tensors)[:3]) or 'nothing'}{', …' if len(tensors) > 3 else ''}"
