"""Read adapter files of every known format, and write the official v1 format.

    own           see `adapter.adapter_file`
    official v1   `adapter_query.weight` (L·K, C), `layers.i.attention.gate`, one gate per head or one for all heads
    litgpt        `transformer.h.i.attn.adapter_wte.weight` (K, C), `...gating_factor` (1, 1, H, 1)
    PEFT          `...layers.i.self_attn.adaption_prompt` (1, K, C), `...adaption_gate` (1,), one gate for all heads

L adapted layers, K prompt length, C width, H query heads, N layers of the base.
"""

import re
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from adapter.adapter_file import FORMAT, AdapterFile, parse_adapter, some_keys, to_float32
from adapter.adaption import Gate
from adapter.atomic_file import atomic_path
from adapter.checkpoint_config import DecoderSettings
from adapter.errors import AdapterError, CheckpointError
from adapter.tensor_files import open_tensors, read_metadata

# Prompts and gates of the foreign formats; each key holds its layer's number.
_V1_GATE = re.compile(r"layers\.(\d+)\.attention\.gate")
_LITGPT = re.compile(r"transformer\.h\.(\d+)\.attn\.(?:(adapter_wte\.weight)|gating_factor)")
_PEFT = re.compile(r"(?:.+\.)?layers\.(\d+)\.self_attn\.adaption_(?:(prompt)|gate)")


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
        file = parse_adapter(path, header, tensors)
    elif "adapter_query.weight" in tensors:
        file = _read_v1(path, tensors, gate or "identity", n_layers)
    elif any(_LITGPT.fullmatch(key) for key in tensors):
        file = _read_per_layer(path, tensors, _LITGPT)
    elif any(_PEFT.fullmatch(key) for key in tensors):
        file = _read_per_layer(path, tensors, _PEFT)
    else:
        raise CheckpointError(f"{path}: no adapter of a known form (ours, official v1, litgpt, PEFT); {some_keys(tensors)}")
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
    with atomic_path(Path(path)) as part:
        torch.save(state, part)


def _read_v1(path: Path, tensors: dict[str, Tensor], convention: Gate, n_layers: int | None) -> AdapterFile:
    gates: dict[int, Tensor] = {}
    for key, tensor in tensors.items():
        if match := _V1_GATE.fullmatch(key):
            gates[int(match[1])] = to_float32(tensor).flatten()
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
        prompt=to_float32(query).unflatten(0, (n_layers, -1)),
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
            to_float32(tensor).flatten(0, -2) if is_prompt else to_float32(tensor).flatten()
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
