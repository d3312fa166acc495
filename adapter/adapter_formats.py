"""Read adapter files of every known format; `adapter.adapter_export` writes the foreign ones.

    own           see `adapter.adapter_file`; of every method
    official v1   `adapter_query.weight` (L·K, C), `layers.i.attention.gate`, one gate per head or one for all heads
    litgpt        `transformer.h.i.attn.adapter_wte.weight` (K, C), `...gating_factor` (1, 1, H, 1)
    PEFT          `...layers.i.self_attn.adaption_prompt` (1, K, C), `...adaption_gate` (1,), one gate for all heads;
                  or a LoRA's folder (see `adapter.peft_lora`)

L adapted layers, K prompt length, C width, H query heads, N layers of the base.
"""

import re
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from adapter.adapter_file import FORMAT, AdapterFile, some_keys, to_float32
from adapter.adapter_header import parse_adapter
from adapter.adaption import AdaptionConfig, Gate
from adapter.base.json_config import JsonConfig, PositiveInt
from adapter.base.tensor_files import is_safetensors, open_tensors, read_metadata
from adapter.errors import AdapterError, CheckpointError
from adapter.json_object import read_object
from adapter.peft_lora import PEFT_CONFIG, PEFT_WEIGHTS, PeftLoraConfig, read_peft_lora

# Prompts and gates of the foreign formats; each key holds its layer's number.
_V1_GATE = re.compile(r"layers\.(\d+)\.attention\.gate")
_LITGPT = re.compile(r"transformer\.h\.(\d+)\.attn\.(?:(adapter_wte\.weight)|gating_factor)")
_V2 = re.compile(r"(?:llama\.)?layers\.\d+\.(?:attention|feed_forward)\.w\w[._]?(?:added_)?(?:bias|scale)")
_PEFT = re.compile(r"(?:.+\.)?layers\.(\d+)\.self_attn\.adaption_(?:(prompt)|gate)")


class PeftConfig(JsonConfig):
    """PEFT's `adapter_config.json`."""

    peft_type: Literal["ADAPTION_PROMPT"]
    adapter_layers: PositiveInt
    """L"""
    adapter_len: PositiveInt
    """K"""


def read_adapter(path: str | Path, *, gate: Gate | None = None, n_layers: int | None = None) -> AdapterFile:
    """Read an adapter file of any format above, recognised by its content; or PEFT's folder.

    gate: the convention of an official v1 file, which does not state it. `identity`, the default, is what the official
    v1 inference code applies, and so right for the released weights; `tanh` is what the official training code applies.
    The other formats imply their convention; another `gate` is an error.
    n_layers: L of an official v1 file that has gates on more layers than are adapted, where L cannot be inferred.

    Raises CheckpointError, naming file and key, for a file that is damaged or of no known format. A pickle cannot run
    code.
    """
    path = Path(path)
    if gate not in (None, *get_args(Gate)):
        raise AdapterError(f"gate must be 'tanh' or 'identity', got {gate!r}")
    if path.is_dir():
        path, peft = _open_peft_folder(path)
    else:
        peft = None
    tensors = open_tensors(path)
    if is_safetensors(path) and (header := read_metadata(path)).get("format") == FORMAT:
        file = parse_adapter(path, header, tensors)
    elif "adapter_query.weight" in tensors:
        file = _read_v1(path, tensors, gate or "identity", n_layers)
    elif any(_LITGPT.fullmatch(key) for key in tensors):
        file = _read_per_layer(path, tensors, _LITGPT)
    elif any(_PEFT.fullmatch(key) for key in tensors):
        file = _read_per_layer(path, tensors, _PEFT)
    elif any(".lora_" in key for key in tensors):
        file = read_peft_lora(path, tensors, peft if isinstance(peft, PeftLoraConfig) else None)
    elif any(_V2.fullmatch(key) for key in tensors):
        raise CheckpointError(
            f"{path}: an official LLaMA-Adapter V2 file, whose scales and biases stand elsewhere than in the paper, so "
            "that they mean something else here; train one with adapter.method=v2"
        )
    else:
        raise CheckpointError(
            f"{path}: no adapter of a known format (own, official v1, litgpt, PEFT); {some_keys(tensors)}"
        )
    if gate and gate != (own := getattr(file.config, "gate", None)):
        raise CheckpointError(f"{path}: its gates are for {own!r}, not {gate!r}")
    for name, tensor in file.tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: a {name} is not finite")
    if isinstance(peft, PeftConfig) and (peft.adapter_layers, peft.adapter_len) != tuple(file.prompt.shape[:2]):
        raise CheckpointError(
            f"{path.with_name(PEFT_CONFIG)}: states adapter_layers and adapter_len "
            f"{peft.adapter_layers, peft.adapter_len}, {path.name} has {tuple(file.prompt.shape[:2])}"
        )
    return file


def prompt_file(prompt: Tensor, gate: Tensor, convention: Gate = "identity", *, base_layers: int) -> AdapterFile:
    """An adapter of prompts (L, K, C) and gates (L, H) or (L, 1), for a base of so many layers, as other files state
    it."""
    config = AdaptionConfig(n_layers=len(prompt), prompt_length=prompt.shape[1], gate=convention)
    tensors = {"prompt": prompt, "gate": gate}
    return AdapterFile(config=config, tensors=tensors, base_shape={"n_layers": base_layers})


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
        # The official code has gates on every layer; those below the adapted layers are not trained and stay zero.
        idle = next((i for i, row in enumerate(gate) if row.any()), 0) if 0 in gates else 0
        fitting = [n for n in {len(gate), len(gate) - idle} if len(query) % n == 0]
        if len(fitting) != 1:
            raise CheckpointError(
                f"{path}: adapter_query.weight has {len(query)} rows and there are {len(gate)} gates, of which the "
                f"lowest {idle} are zero: state how many layers are adapted, n_layers="
            )
        n_layers = fitting[0]
    elif not 1 <= n_layers <= len(gate) or len(query) % n_layers:
        raise CheckpointError(f"{path}: {n_layers} layers do not fit {len(query)} prompt rows and {len(gate)} gates")
    prompt = to_float32(query).unflatten(0, (n_layers, -1))
    return prompt_file(prompt, gate[-n_layers:].clone(), convention, base_layers=max(gates) + 1)


def _read_per_layer(path: Path, tensors: dict[str, Tensor], pattern: re.Pattern[str]) -> AdapterFile:
    """Read litgpt's or PEFT's format: one prompt and gate per adapted layer; neither library applies tanh."""
    prompts: dict[int, Tensor] = {}
    gates: dict[int, Tensor] = {}
    for key, tensor in tensors.items():
        match = pattern.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{path}: {key} is no part of a LLaMA-Adapter (v1)")
        layer, is_prompt = int(match[1]), match[2] is not None
        if not is_prompt:
            gates[layer] = to_float32(tensor).flatten()
        elif tensor.dim() >= 2 and tensor.numel() == tensor.shape[-2] * tensor.shape[-1]:
            prompts[layer] = to_float32(tensor).flatten(0, -2)
        else:
            raise CheckpointError(f"{path}: {key} has shape {tuple(tensor.shape)}, not (K, C)")
    if unpaired := sorted(prompts.keys() ^ gates.keys()):
        layer = unpaired[0]
        raise CheckpointError(f"{path}: layer {layer} has a {'prompt' if layer in prompts else 'gate'} only")
    return prompt_file(_stack(path, prompts, "prompt"), _stack(path, gates, "gate"), base_layers=max(gates) + 1)


def _stack(path: Path, layers: dict[int, Tensor], kind: str) -> Tensor:
    """Stack the tensors of consecutive layers, lowest first. The top layer is the base's last."""
    order = sorted(layers)
    if not order:
        raise CheckpointError(f"{path}: holds no {kind}")
    if order != list(range(order[0], order[0] + len(order))):
        raise CheckpointError(f"{path}: the {kind}s of layers {order} are not of neighbouring layers")
    shape = layers[order[0]].shape
    for i in order:
        if layers[i].shape != shape:
            raise CheckpointError(
                f"{path}: layer {i}'s {kind} has shape {tuple(layers[i].shape)}, layer {order[0]}'s {tuple(shape)}"
            )
    return torch.stack([layers[i] for i in order])


def _open_peft_folder(folder: Path) -> tuple[Path, PeftConfig | PeftLoraConfig]:
    """The weights file of a PEFT folder, and its configuration."""
    if not (folder / PEFT_CONFIG).is_file():
        own = folder / "adapter.safetensors"
        way_out = f"name its file, {own}" if own.is_file() else "name an adapter file"
        raise CheckpointError(f"{folder}: a folder without PEFT's {PEFT_CONFIG}; {way_out}")
    values = read_object(folder / PEFT_CONFIG, CheckpointError)
    kind = PeftLoraConfig if values.get("peft_type") == "LORA" else PeftConfig
    config = kind.parse(values, folder / PEFT_CONFIG)
    for name in (PEFT_WEIGHTS, "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name, config
    raise CheckpointError(f"{folder}: no adapter_model.safetensors or adapter_model.bin")
