"""A LoRA goes to PEFT and comes back, and computes the same on both sides."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeerLora
from peft import PeftModel, get_peft_model

from adapter.adapter_export import export_adapter
from adapter.adapter_file import apply_adapter, extract_adapter
from adapter.adapter_formats import read_adapter
from adapter.errors import AdapterError, CheckpointError
from adapter.hf import attach
from adapter.methods.lora import LoraConfig
from tests.adapter.methods.samples import LINEARS, METHODS, SMALL, add, base
from tests.adapter.models import peer, tokens

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's

IDS = tokens(2, 13, SMALL["vocab_size"])


@pytest.mark.parametrize("method", [LoraConfig(rank=3, alpha=5.0, targets=LINEARS), LoraConfig(n_layers=2, rank=2)],
                         ids=["all", "top"])  # fmt: skip
def test_peft_loads_what_is_exported(method: LoraConfig, tmp_path: Path) -> None:
    model = add(base(), method)
    file = extract_adapter(model)
    export_adapter(file, tmp_path / "peft", "peft", model.config, base_name="org/base")
    theirs = PeftModel.from_pretrained(peer(model), tmp_path / "peft").eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=0, atol=2e-5)
    again = read_adapter(tmp_path / "peft")
    assert again.config == method
    assert again.tensors.keys() == file.tensors.keys()
    assert all(torch.equal(again.tensors[name], file.tensors[name]) for name in file.tensors)


@pytest.mark.parametrize("changes", [
    {}, {"use_rslora": True}, {"layers_to_transform": [1, 2]}, {"target_modules": "all-linear"}
], ids=str)  # fmt: skip
def test_what_peft_saves_is_read(changes: dict[str, Any], tmp_path: Path) -> None:
    plain = base()
    config = PeerLora(**{"r": 3, "lora_alpha": 7, "target_modules": ["k_proj", "up_proj"], **changes})
    theirs = get_peft_model(peer(plain), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path)
    apply_adapter(plain, read_adapter(tmp_path))
    torch.testing.assert_close(plain(IDS), theirs(IDS).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("changes", "message"), [
    ({"use_dora": True}, "use_dora is True, which this project's LoRA does not have"),
    ({"bias": "all"}, "bias is 'all'"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is"),
    ({"r": 2}, r"has shape \(3, 24\), the configuration wants r 2"),
    ({"lora_alpha": -1}, "lora_alpha is -1"),
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
])  # fmt: skip
def test_what_is_more_than_a_lora_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = add(base(), LoraConfig(rank=3))
    export_adapter(extract_adapter(model), tmp_path, "peft", model.config)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_what_the_formats_cannot_express(tmp_path: Path) -> None:
    model = add(base(), LoraConfig(rank=3))
    file = extract_adapter(model)
    export_adapter(file, tmp_path, "peft", model.config)
    with pytest.raises(CheckpointError, match="a LoRA without its alpha; name PEFT's folder"):
        read_adapter(tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="litgpt's format cannot hold an adapter of the method lora"):
        export_adapter(file, tmp_path / "x", "litgpt", model.config)
    with pytest.raises(AdapterError, match="method is lora, and only prompts can be attached to a transformers model"):
        attach(peer(model), file)
    for name in ("v2", "ia3", "bias", "full"):
        with pytest.raises(AdapterError, match=f"PEFT's format cannot hold an adapter of the method {name}"):
            export_adapter(extract_adapter(add(base(), METHODS[name])), tmp_path / "x", "peft", model.config)
    torch.save({"layers.0.attention.wq_bias": torch.zeros(3), "norm.weight": torch.ones(3)}, tmp_path / "v2.pth")
    with pytest.raises(CheckpointError, match="an official LLaMA-Adapter V2 file"):
        read_adapter(tmp_path / "v2.pth")
