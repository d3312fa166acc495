"""Adapter files: prompts and gates with all that is needed to know which base they belong to.

Our own form is a safetensors file of `prompt` (L, K, C) and `gate` (L, H) in float32, with a header that holds the
format's version, the gate convention, the base's shape and fingerprint, and the tokenizer's hash; an adapter that reads
images adds `vision.*`, its projection, and the encoder's identity and preprocessing. Read besides:

    official v1   `adapter_query.weight` (L·K, C), `layers.i.attention.gate`, per head or one for all
    litgpt        `transformer.h.i.attn.adapter_wte.weight` (K, C), `...gating_factor` (1, 1, H, 1)
    PEFT          `...layers.i.self_attn.adaption_prompt` (1, K, C), `...adaption_gate` (1,), one for all heads

L adapted layers, K prompt length, C width, H query heads, N layers of the base.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapter.adaption import AdaptionConfig, Gate
from adapter.checkpoint_config import DecoderSettings
from adapter.decoder import Llama, LlamaConfig
from adapter.errors import AdapterError, CheckpointError
from adapter.image_projection import ImageProjectionConfig, Projection
from adapter.tensor_files import atomic, open_tensors, read_metadata

FORMAT = "llama-adapter"
VERSION = 1
_SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size")

_HEADER_KEYS = {"encoder": "tower"}
"""`ImageProjectionConfig` field → its key in the header, where the two differ."""
_OWN, _PROJECTION = {"prompt", "gate"}, "vision."
# Prompts and gates of the foreign forms, each key with its layer's number.
_V1_GATE = re.compile(r"layers\.(\d+)\.attention\.gate")
_LITGPT = re.compile(r"transformer\.h\.(\d+)\.attn\.(?:(adapter_wte\.weight)|gating_factor)")
_PEFT = re.compile(r"(?:.+\.)?layers\.(\d+)\.self_attn\.adaption_(?:(prompt)|gate)")


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterFile:
    """What an adapter file says; tensors are float32 on the CPU."""

    prompt: Tensor
    """(L, K, C), lowest adapted layer first."""
    gate: Tensor
    """(L, H), or (L, 1) where one gate serves all heads."""
    convention: Gate
    """What the model does to the gates."""
    base_shape: Mapping[str, int] = field(default_factory=dict)
    """What is known of the base's `LlamaConfig`; foreign files say little."""
    base_fingerprint: str | None = None
    """`Checkpoint.fingerprint` of the base; foreign files have none."""
    tokenizer_sha256: str | None = None
    vision: ImageProjectionConfig | None = None
    """How it reads images, and of which encoder; None for text alone."""
    projection: Mapping[str, Tensor] = field(default_factory=dict)
    """The tensors of `adapter.vision.Projection`, by name."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Anything else, as JSON."""

    @property
    def config(self) -> AdaptionConfig:
        n_layers, prompt_length, _ = self.prompt.shape
        return AdaptionConfig(n_layers=n_layers, prompt_length=prompt_length, gate=self.convention, vision=self.vision)

    @property
    def trainable(self) -> int:
        """Trainable parameters."""
        gates = self.gate.numel() if self.convention in ("tanh", "identity") else 0
        return self.prompt.numel() + gates + sum(tensor.numel() for tensor in self.projection.values())

    def save(self, path: str | Path) -> None:
        """Writes our own form; the file appears whole or not at all."""
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
            "tokenizer_sha256": self.tokenizer_sha256 or "",
            "extra": json.dumps(dict(self.extra)),
        }
        if self.vision is not None:
            header["vision"] = json.dumps(_vision_header(self.vision))
        tensors = {"prompt": self.prompt, "gate": self.gate}
        tensors |= {_PROJECTION + name: tensor for name, tensor in self.projection.items()}
        with atomic(path) as part:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata=header)


def adapter_from(
    model: Llama,
    *,
    base_fingerprint: str | None = None,
    tokenizer_sha256: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> AdapterFile:
    """The adaption that a model holds, copied. Raises ValueError if it holds none."""
    if model.adaption_config is None:
        raise AdapterError("the model holds no adapter to save; attach one first")
    return AdapterFile(
        prompt=torch.stack([_float(adaption.prompt) for adaption in model.adaptions]),
        gate=torch.stack([_float(adaption.gate) for adaption in model.adaptions]),
        convention=model.adaption_config.gate,
        base_shape=_shape_of(model.config),
        base_fingerprint=base_fingerprint,
        tokenizer_sha256=tokenizer_sha256,
        vision=model.adaption_config.vision,
        projection={} if model.vision is None else {n: _float(t) for n, t in model.vision.state_dict().items()},
        extra=extra or {},
    )


def attach_file(
    model: Llama,
    file: AdapterFile,
    *,
    fingerprint: str | None = None,
    tokenizer_sha256: str | None = None,
    encoder: str | None = None,
) -> None:
    """Puts a file's adaption on a base, replacing any that is there.

    Raises CheckpointError, leaving the model as it was, if the base's shape, its `fingerprint`, the tokenizer's hash or
    the identity of the `encoder` whose features it will be given is not what the file was made for. What either side does
    not know is not compared: foreign files know shapes only.
    """
    if encoder and file.vision is None:
        raise CheckpointError("the adapter was made for text alone: it cannot read images, leave out the encoder")
    n_layers, _, dim = file.prompt.shape
    shape = _shape_of(model.config)
    wanted = {"dim": dim, **file.base_shape}
    if file.gate.shape[1] != 1:
        wanted["n_heads"] = file.gate.shape[1]
    if wrong := [f"{key} {value}, this base has {shape[key]}" for key, value in wanted.items() if shape[key] != value]:
        raise CheckpointError(f"the adapter was made for another base: it wants {'; '.join(wrong)}")
    if n_layers > model.config.n_layers:
        raise CheckpointError(f"the adapter has {n_layers} layers, this base has only {model.config.n_layers}")
    for what, theirs, ours in (
        ("base of the same shape but other weights: fingerprint", file.base_fingerprint, fingerprint),
        ("tokenizer: sha256", file.tokenizer_sha256, tokenizer_sha256),
        ("image encoder, preprocessing or precision:", file.vision and file.vision.encoder, encoder),
    ):
        if theirs and ours and theirs != ours:
            if "encoder" not in what:  # an encoder's identity is readable, the others are long hashes
                theirs, ours = f"{theirs[:12]}…", f"{ours[:12]}…"
            raise CheckpointError(f"the adapter was made for another {what} {theirs}, here {ours}")
    model.attach(file.config)
    with torch.no_grad():
        for adaption, prompt, gate in zip(model.adaptions, file.prompt, file.gate, strict=True):
            adaption.prompt.copy_(prompt)
            adaption.gate.copy_(gate.expand_as(adaption.gate))
        if model.vision is not None:
            model.vision.load_state_dict(dict(file.projection))


def read_adapter(path: str | Path, *, gate: Gate | None = None, n_layers: int | None = None) -> AdapterFile:
    """Reads any of the forms above, told apart by their content; a folder is taken for PEFT's.

    gate: the convention of an official v1 file, which does not record it: identity, the default, is what the official
    v1 inference code (and so the released weights) does; tanh is what the official training code does. The other
    forms fix theirs, and a `gate` that contradicts is an error.
    n_layers: L of an official v1 file that has gates on more layers than are adapted, where it cannot be inferred.

    Raises CheckpointError, naming file and key, for anything else. No pickle can run code.
    """
    path = Path(path)
    if gate not in (None, *get_args(Gate)):
        raise AdapterError(f"gate must be 'tanh' or 'identity', got {gate!r}")
    settings = None
    if path.is_dir():
        path, settings = _peft_weights(path)
    tensors = open_tensors(path)
    if path.suffix == ".safetensors" and (header := read_metadata(path)).get("format") == FORMAT:
        file = _read_own(path, header, tensors)
    elif "adapter_query.weight" in tensors:
        file = _read_v1(path, tensors, gate or "identity", n_layers)
    elif any(_LITGPT.fullmatch(key) for key in tensors):
        file = _read_per_layer(path, tensors, _LITGPT)
    elif any(_PEFT.fullmatch(key) for key in tensors):
        file = _read_per_layer(path, tensors, _PEFT)
    else:
        raise CheckpointError(f"{path}: no adapter of a known form (ours, official v1, litgpt, PEFT); {_some(tensors)}")
    if gate and gate != file.convention:
        raise CheckpointError(f"{path}: its gates are for {file.convention!r}, not {gate!r}")
    for name, tensor in (("prompt", file.prompt), ("gate", file.gate), *file.projection.items()):
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: a {name} is not finite")
    if settings is not None:
        stated = (settings.whole("adapter_layers"), settings.whole("adapter_len"))
        if stated != tuple(file.prompt.shape[:2]):
            raise CheckpointError(
                f"{settings.file}: states adapter_layers and adapter_len {stated}, {path.name} has "
                f"{tuple(file.prompt.shape[:2])}"
            )
    return file


def export_v1(file: AdapterFile, path: str | Path, *, gate: Gate = "identity") -> None:
    """Writes the official v1 form, for code that applies `gate`: identity is the official inference code's.

    The values are converted where the conventions differ, so that the outputs stay. Raises ValueError where that, or
    the form, is impossible: an identity gate outside (-1, 1) is the tanh of nothing; N and H must be known; it knows no
    images, and none of the ablations.
    """
    if file.vision is not None or file.convention not in ("tanh", "identity"):
        what = "reads images" if file.vision is not None else f"has the gate {file.convention!r}"
        raise AdapterError(f"the official v1 form cannot hold an adapter that {what}; keep our own form")
    missing = [key for key in ("n_layers", "n_heads") if key not in file.base_shape]
    if missing:
        raise AdapterError(f"the base's {' and '.join(missing)} must be known: attach the file, and use `adapter_from`")
    gates = file.gate.expand(-1, file.base_shape["n_heads"])
    if gate != file.convention:
        if gate == "tanh" and (gates.abs() >= 1).any():
            raise AdapterError("a gate of 1 or more has no counterpart under tanh; export for 'identity'")
        gates = gates.tanh() if file.convention == "tanh" else gates.atanh()
    first = file.base_shape["n_layers"] - file.config.n_layers
    state = {"adapter_query.weight": file.prompt.flatten(0, 1).clone()}
    for layer, value in enumerate(gates, start=first):
        state[f"layers.{layer}.attention.gate"] = value.reshape(1, -1, 1, 1).clone()
    with atomic(Path(path)) as part:
        torch.save(state, part)


def _read_own(path: Path, header: dict[str, str], tensors: dict[str, Tensor]) -> AdapterFile:
    if header.get("version") != str(VERSION):
        raise CheckpointError(f"{path}: format version {header.get('version')!r}; this code reads version {VERSION}")
    projection = {name.removeprefix(_PROJECTION): _float(t) for name, t in tensors.items() if name not in _OWN}
    try:
        convention: Any = header["gate"]
        vision = _read_vision(header["vision"]) if "vision" in header else None
        stated = (int(header["n_layers"]), int(header["prompt_length"]))
        base_shape, extra = json.loads(header["base_shape"]), json.loads(header["extra"])
        if convention not in get_args(Gate) or not isinstance(base_shape, dict) or not isinstance(extra, dict):
            raise AdapterError(f"gate {convention!r}, base_shape {base_shape!r}, extra {extra!r}")
        if unknown := base_shape.keys() - set(_SHAPE):
            raise AdapterError(f"base_shape holds {sorted(unknown)}")
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({error!r})") from error
    names = _OWN | {_PROJECTION + name for name in _projection_shapes(vision, 1)}
    if tensors.keys() != names:
        raise CheckpointError(f"{path}: expected the tensors {', '.join(sorted(names))}; {_some(tensors)}")
    prompt, gate = _float(tensors["prompt"]), _float(tensors["gate"])
    if prompt.dim() != 3 or gate.dim() != 2 or stated != prompt.shape[:2] or len(gate) != len(prompt):
        raise CheckpointError(
            f"{path}: prompt {tuple(prompt.shape)} and gate {tuple(gate.shape)} are not the {stated[0]} layers of "
            f"{stated[1]} prompts that the header states"
        )
    for name, shape in _projection_shapes(vision, prompt.shape[2]).items():
        if projection[name].shape != shape:
            raise CheckpointError(
                f"{path}: {_PROJECTION}{name} has shape {tuple(projection[name].shape)}, the header states {shape}"
            )
    return AdapterFile(
        prompt=prompt,
        gate=gate,
        convention=convention,
        vision=vision,
        projection=projection,
        base_shape=base_shape,
        base_fingerprint=header.get("base_fingerprint") or None,
        tokenizer_sha256=header.get("tokenizer_sha256") or None,
        extra=extra,
    )


def _vision_header(vision: ImageProjectionConfig) -> dict[str, Any]:
    """The header's JSON for `vision`. Files of format version 1 spell the encoder's key "tower"."""
    return {_HEADER_KEYS.get(name, name): value for name, value in asdict(vision).items()}


def _read_vision(header: str) -> ImageProjectionConfig:
    fields = json.loads(header)
    if not isinstance(fields, dict) or not all(isinstance(width, int) for width in fields.get("widths", [None])):
        raise AdapterError(f"vision {header}")
    names = {key: name for name, key in _HEADER_KEYS.items()}
    fields = {names.get(key, key): value for key, value in fields.items()}
    try:
        return ImageProjectionConfig(**{**fields, "widths": tuple(fields["widths"])})
    except TypeError as error:
        raise AdapterError(f"vision {header}: {error}") from error


def _projection_shapes(vision: ImageProjectionConfig | None, dim: int) -> dict[str, tuple[int, ...]]:
    if vision is None:
        return {}
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Projection(vision, dim).state_dict().items()}


def _read_v1(path: Path, tensors: dict[str, Tensor], convention: Gate, n_layers: int | None) -> AdapterFile:
    gates: dict[int, Tensor] = {}
    for key, tensor in tensors.items():
        if match := _V1_GATE.fullmatch(key):
            gates[int(match[1])] = _float(tensor).flatten()
        elif key != "adapter_query.weight":
            raise CheckpointError(f"{path}: {key} is no part of an official v1 text adapter")
    query = tensors["adapter_query.weight"]
    if query.dim() != 2:
        raise CheckpointError(f"{path}: adapter_query.weight has shape {tuple(query.shape)}, not (L·K, C)")
    gate = _stack(path, gates, "attention.gate")
    if n_layers is None:
        # The official code keeps gates on every layer; those below the adapted ones are never trained away from zero.
        idle = next((i for i, row in enumerate(gate) if row.any()), 0) if 0 in gates else 0
        fitting = [n for n in {len(gate), len(gate) - idle} if len(query) % n == 0]
        if len(fitting) != 1:
            raise CheckpointError(
                f"{path}: adapter_query.weight has {len(query)} rows and there are {len(gate)} gates, {idle} of them "
                "zero below the first other: state how many layers are adapted, n_layers="
            )
        n_layers = fitting[0]
    elif not 1 <= n_layers <= len(gate) or len(query) % n_layers:
        raise CheckpointError(f"{path}: {n_layers} layers do not fit {len(query)} prompt rows and {len(gate)} gates")
    return AdapterFile(
        prompt=_float(query).unflatten(0, (n_layers, -1)),
        gate=gate[-n_layers:].clone(),
        convention=convention,
        base_shape={"n_layers": max(gates) + 1},
    )


def _read_per_layer(path: Path, tensors: dict[str, Tensor], form: re.Pattern[str]) -> AdapterFile:
    """litgpt's and PEFT's: each adapted layer has its own prompt and gate; neither applies tanh."""
    prompts: dict[int, Tensor] = {}
    gates: dict[int, Tensor] = {}
    for key, tensor in tensors.items():
        match = form.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{path}: {key} is no part of a LLaMA-Adapter (v1)")
        layer, is_prompt = int(match[1]), match[2] is not None
        if is_prompt and (tensor.dim() < 2 or tensor.numel() != tensor.shape[-2] * tensor.shape[-1]):
            raise CheckpointError(f"{path}: {key} has shape {tuple(tensor.shape)}, not (K, C)")
        (prompts if is_prompt else gates)[layer] = (
            _float(tensor).flatten(0, -2) if is_prompt else _float(tensor).flatten()
        )
    if odd := sorted(prompts.keys() ^ gates.keys()):
        raise CheckpointError(f"{path}: layer {odd[0]} has a {'prompt' if odd[0] in prompts else 'gate'} only")
    return AdapterFile(
        prompt=_stack(path, prompts, "prompt"),
        gate=_stack(path, gates, "gate"),
        convention="identity",
        base_shape={"n_layers": max(gates) + 1},
    )


def _stack(path: Path, layers: dict[int, Tensor], what: str) -> Tensor:
    """The layers' tensors in order; they must be neighbours of one shape. The topmost is the base's last."""
    order = sorted(layers)
    if not order:
        raise CheckpointError(f"{path}: holds no {what}")
    if order != list(range(order[0], order[0] + len(order))):
        raise CheckpointError(f"{path}: the {what}s of layers {order} are not of neighbouring layers")
    first = layers[order[0]].shape
    if odd := next((i for i in order if layers[i].shape != first), None):
        raise CheckpointError(
            f"{path}: layer {odd}'s {what} has shape {tuple(layers[odd].shape)}, layer {order[0]}'s {tuple(first)}"
        )
    return torch.stack([layers[i] for i in order])


def _peft_weights(folder: Path) -> tuple[Path, DecoderSettings]:
    if not (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder}: a folder without PEFT's adapter_config.json; give an adapter's file")
    settings = DecoderSettings(folder / "adapter_config.json")
    if settings.get("peft_type") != "ADAPTION_PROMPT":
        raise settings.error("peft_type", "must be 'ADAPTION_PROMPT'")
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name, settings
    raise CheckpointError(f"{folder}: no adapter_model.safetensors or adapter_model.bin")


def _shape_of(config: LlamaConfig) -> dict[str, int]:
    return {key: getattr(config, key) for key in _SHAPE}


def _float(tensor: Tensor) -> Tensor:
    """A float32 copy on the CPU, apart from any file or model."""
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _some(tensors: dict[str, Tensor]) -> str:
    return f"it holds {', '.join(list(tensors)[:3]) or 'nothing'}{', …' if len(tensors) > 3 else ''}"
