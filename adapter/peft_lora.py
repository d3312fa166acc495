"""LoRA in the library PEFT's format: a folder of `adapter_config.json` and `adapter_model.safetensors`.

    base_model.model.model.layers.i.self_attn.q_proj.lora_A.weight (r, I), ...lora_B.weight (O, r)

Rows of queries and keys stand in Hugging Face's order on both sides, as this project's decoder holds them, so that no
row moves. What a file may hold besides (DoRA, trained biases or embeddings, ranks that differ between layers) is
refused by name, because it would otherwise be left out without a word.

r rank, I inputs, O outputs of a layer, N layers of the base, L adapted ones.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from adapter.adapter_file import AdapterFile, some_keys, to_float32
from adapter.atomic_file import atomic_path
from adapter.base.json_config import JsonConfig, PositiveFloat, PositiveInt
from adapter.base.tensor_names import hf_key
from adapter.errors import CheckpointError
from adapter.methods.base import LINEARS
from adapter.methods.lora import LoraConfig

_MODULES = {
    name: hf_key(f"layers.0.{path}.weight").split(".", 3)[3].removesuffix(".weight") for name, path in LINEARS.items()
}
"""Short name of a linear layer → its module within a layer of a transformers model, such as `self_attn.q_proj`."""
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Names of the files in PEFT's folder."""
_LORA = re.compile(r"(?:.+\.)?layers\.(\d+)\.(\w+\.\w+)\.lora_(A|B)(?:\.\w+)?\.weight")


class PeftLoraConfig(JsonConfig):
    """PEFT's `adapter_config.json` of a LoRA."""

    peft_type: Literal["LORA"]
    r: PositiveInt
    """r"""
    lora_alpha: PositiveFloat
    """α"""
    use_rslora: bool = False
    """α is divided by √r, not by r."""
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: list[str] = Field(default_factory=list)
    rank_pattern: dict[str, Any] = Field(default_factory=dict)
    alpha_pattern: dict[str, Any] = Field(default_factory=dict)

    def check(self) -> None:
        """Raise CheckpointError for a LoRA that has more than this project's."""
        plain = {"use_dora": False, "lora_bias": False, "bias": "none", "modules_to_save": [], "rank_pattern": {},
                 "alpha_pattern": {}}  # fmt: skip
        for key, value in plain.items():
            if (given := getattr(self, key)) != value:
                raise self.error(f"{key} is {given!r}, which this project's LoRA does not have; train with {value!r}")


def read_peft_lora(path: Path, tensors: Mapping[str, Tensor], config: PeftLoraConfig | None) -> AdapterFile:
    """Read the weights of a LoRA, in PEFT's names, with the configuration of its folder.

    Raises CheckpointError, naming the file, for a LoRA without its configuration, on other layers than those of
    `adapter.methods.base.LINEARS`, or on some that are not the same in all layers from one up to the top.
    """
    if config is None:
        raise CheckpointError(f"{path}: a LoRA without its alpha; name PEFT's folder, with adapter_config.json in it")
    config.check()
    targets = {module: name for name, module in _MODULES.items()}
    found: dict[str, Tensor] = {}
    places: dict[int, set[str]] = {}
    for key, tensor in tensors.items():
        match = _LORA.fullmatch(key)
        if match is None or match[2] not in targets:
            raise CheckpointError(f"{path}: {key} is no part of a LoRA on the linear layers of a LLaMA's blocks")
        layer, name, part = int(match[1]), targets[match[2]], match[3].lower()
        if tensor.dim() != 2 or tensor.shape[part == "b"] != config.r:
            raise CheckpointError(
                f"{path}: {key} has shape {tuple(tensor.shape)}, the configuration wants r {config.r}"
            )
        found[f"layers.{layer}.{LINEARS[name]}.delta.{part}"] = to_float32(tensor)
        places.setdefault(layer, set()).add(f"{name}.{part}")
    if not places:
        raise CheckpointError(f"{path}: holds no LoRA; {some_keys(tensors)}")
    layers, wanted = sorted(places), {f"{name[:2]}.{part}" for name in places[max(places)] for part in "ab"}
    if layers != list(range(layers[0], layers[0] + len(layers))) or any(one != wanted for one in places.values()):
        raise CheckpointError(f"{path}: the adapted linear layers are not the same in all of the layers {layers}")
    scale = config.r**0.5 if config.use_rslora else 1.0
    method = LoraConfig(
        n_layers=None if layers[0] == 0 else len(layers),
        rank=config.r,
        alpha=config.lora_alpha * scale,
        targets=tuple({name[:2] for name in wanted}),
    )
    return AdapterFile(config=method, tensors=found, base_shape={"n_layers": layers[-1] + 1})


def write_peft_lora(folder: Path, file: AdapterFile, config: LoraConfig, n_layers: int, base_name: str) -> None:
    """Write the folder that PEFT's `PeftModel.from_pretrained` reads, the configuration last; N = `n_layers`."""
    names = {path: _MODULES[name] for name, path in LINEARS.items()}
    tensors = {}
    for key, tensor in file.tensors.items():
        _, layer, part, linear, _, which = key.split(".")
        module = f"base_model.model.model.layers.{layer}.{names[f'{part}.{linear}']}"
        tensors[f"{module}.lora_{which.upper()}.weight"] = tensor.contiguous()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name or None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [_MODULES[name].rpartition(".")[2] for name in config.targets],
        "layers_to_transform": list(range(n_layers - config.n_layers, n_layers)) if config.n_layers else None,
        "inference_mode": True,
    }
    with atomic_path(folder / PEFT_WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    with atomic_path(folder / PEFT_CONFIG) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")
