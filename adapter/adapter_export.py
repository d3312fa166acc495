"""Write an adapter in a foreign format, for the code that reads it (see `adapter.adapter_formats` for the tensors).

    official v1   one file; a gate per head, under either convention
    litgpt        one file; a gate per head, without tanh
    PEFT          a folder of `adapter_config.json` and `adapter_model.safetensors`; a gate per layer, without tanh;
                  or a LoRA (see `adapter.peft_lora`)

litgpt up to 0.5.4 computes what its file means. From 0.5.5 (seen up to 0.5.13) its adapter takes the prompt's keys and
values from wrong rows of the joined projection, unless the base has one key/value head: its layout was changed, the
adapter's code was not. Its commands build K = 10 and L = N - 2; other shapes need its Python API.

What a format cannot express is refused, because the other side would compute something else without a word. Gates are
converted between conventions, so that the outputs stay the same.

L adapted layers, K prompt length, H query heads, N layers of the base.
"""

import json
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapter.adapter_file import AdapterFile, check_adapter_fits
from adapter.adaption import TRAINED_GATES, AdaptionConfig, Gate, gate_factor
from adapter.atomic_file import atomic_path
from adapter.decoder_config import DecoderConfig
from adapter.errors import AdapterError
from adapter.methods.lora import LoraConfig
from adapter.peft_lora import PEFT_CONFIG, PEFT_WEIGHTS, write_peft_lora

Format = Literal["v1", "litgpt", "peft"]
_TITLES = {"v1": "the official v1 format", "litgpt": "litgpt's format", "peft": "PEFT's format"}
_PEFT_SWITCHES = {"sliding_window", "sliding_layers", "rope_scaling", "ffn_bias"}
"""The switches of a base that its Llama and Mistral models have and that its adaption prompts do not touch."""


def export_adapter(
    file: AdapterFile,
    path: str | Path,
    format: Format,
    base: DecoderConfig,
    *,
    gate: Gate = "identity",
    base_name: str = "",
) -> None:
    """Write an adapter in a foreign format: a file, or PEFT's folder. Each file appears complete or not at all.

    base: the configuration of the adapter's base. gate: the convention of the code that will read an official v1 file:
    `identity`, as the official inference code, or `tanh`, as the official training code. base_name: name or path of the
    base, for PEFT to note.

    Raises AdapterError, with the reason, if the format cannot express the adapter on this base, and CheckpointError if
    the adapter was made for another base.
    """
    path = Path(path)
    check_export(file, format, base, gate=gate)
    if isinstance(file.config, LoraConfig):
        write_peft_lora(path, file, file.config, base.n_layers, base_name)
        return
    gates = _exported_gates(file, format, base, gate)
    layers = range(base.n_layers - len(file.prompt), base.n_layers)
    if format == "peft":
        _write_peft(path, file, gates, layers, base_name)
        return
    if path.suffix == ".safetensors":
        raise AdapterError(f"{path}: {_TITLES[format]} is PyTorch's own, not safetensors; name the file .pth")
    state: dict[str, Tensor] = {}
    if format == "v1":
        state["adapter_query.weight"] = file.prompt.flatten(0, 1).clone()
    for layer, prompt, row in zip(layers, file.prompt, gates, strict=True):
        if format == "v1":
            state[f"layers.{layer}.attention.gate"] = row.reshape(1, -1, 1, 1).clone()
        else:
            state[f"transformer.h.{layer}.attn.adapter_wte.weight"] = prompt.clone()
            state[f"transformer.h.{layer}.attn.gating_factor"] = row.reshape(1, 1, -1, 1).clone()
    with atomic_path(path) as part, part.open("wb") as stream:  # given a path, torch would write its name into the file
        torch.save(state if format == "v1" else {"model": state}, stream)


def check_export(file: AdapterFile, format: Format, base: DecoderConfig, *, gate: Gate = "identity") -> None:
    """Raise an error as `export_adapter` does, before anything is written."""
    check_adapter_fits(file, base)
    if not isinstance(file.config, LoraConfig) or format != "peft":
        _exported_gates(file, format, base, gate)


def _exported_gates(file: AdapterFile, format: Format, base: DecoderConfig, gate: Gate) -> Tensor:
    """The gates as the format holds them: (L, H), or (L, 1) for PEFT."""
    title, switches, config = _TITLES[format], base.switches(), file.config
    if not isinstance(config, AdaptionConfig):
        raise AdapterError(f"{title} cannot hold an adapter of the method {config.method}; keep the own format")
    if gate not in TRAINED_GATES or (gate == "tanh" and format != "v1"):
        raise AdapterError(f"{title} has no gates for {gate!r}")
    if file.vision is not None:
        raise AdapterError(f"{title} cannot hold an adapter that reads images; keep the own format")
    if config.gate == "prefix":
        raise AdapterError(
            f"{title} cannot hold an adapter with the gate 'prefix', whose prompts share the words' softmax"
        )
    if format != "v1" and base.qk_norm:
        raise AdapterError(f"{title} is for bases without a norm of keys: its code would not normalise the prompt's")
    if format == "peft" and (odd := sorted(switches.keys() - _PEFT_SWITCHES)):
        raise AdapterError(
            f"{title} is for Llama and Mistral with heads of width dim / n_heads and without biases in attention; this "
            f"base differs in {', '.join(f'{name} {switches[name]}' for name in odd)}"
        )
    gates = gate_factor(file.gate, config.gate)
    if gate == "tanh":
        if (gates.abs() >= 1).any():
            raise AdapterError("a gate of 1 or more has no counterpart under tanh; export with gate='identity'")
        gates = file.gate if config.gate == "tanh" else gates.atanh()
    if format != "peft":
        return gates.expand(-1, base.n_heads)
    if (uneven := (gates != gates[:, :1]).any(1)).any():
        layer = base.n_layers - len(gates) + int(uneven.nonzero()[0])
        raise AdapterError(f"{title} has one gate per layer; the heads of layer {layer} have different ones")
    return gates[:, :1]


def _write_peft(folder: Path, file: AdapterFile, gates: Tensor, layers: range, base_name: str) -> None:
    """Write the folder that PEFT's `PeftModel.from_pretrained` reads, the configuration last."""
    tensors = {}
    for layer, prompt, gate in zip(layers, file.prompt, gates, strict=True):
        attention = f"base_model.model.model.layers.{layer}.self_attn"
        tensors[f"{attention}.adaption_prompt"] = prompt[None].contiguous()
        tensors[f"{attention}.adaption_gate"] = gate.contiguous()
    config = {
        "peft_type": "ADAPTION_PROMPT",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name or None,
        "target_modules": "self_attn",
        "adapter_layers": len(layers),
        "adapter_len": file.prompt.shape[1],
        "inference_mode": True,
    }
    with atomic_path(folder / PEFT_WEIGHTS) as part:
        save_file(tensors, part, metadata={"format": "pt"})
    with atomic_path(folder / PEFT_CONFIG) as part:
        part.write_text(json.dumps(config, indent=2) + "\n")
