"""LLaMA-Adapter: a frozen LLaMA and the small trainable adapter that teaches it (arXiv 2303.16199). Pure PyTorch.

    from adapter import AdaptedModel, AdaptionConfig

    model = AdaptedModel.from_pretrained("llama-7b")                    # a folder in Meta's or Hugging Face's format
    model.add_adapter(AdaptionConfig(n_layers=30, prompt_length=10))    # a fresh adapter, or
    model.load_adapter("adapter.safetensors")                           # own format, official v1, litgpt, PEFT
    model.answer("Give three tips for staying healthy.")                # in the template that adapters are trained on
    model.generate(["Once upon a time"], max_new_tokens=64)
    model.logits(["Once upon a time"])                                  # one (T, V) per text
    model.save_adapter("adapter.safetensors")

The names below are imported on first use, so that `import adapter` alone takes no time.
"""

# ruff: noqa: F401

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapter.adapter_export import export_adapter
    from adapter.adapter_file import AdapterFile, apply_adapter, extract_adapter
    from adapter.adapter_formats import read_adapter
    from adapter.adaption import AdaptionConfig
    from adapter.base.checkpoint import load_decoder, open_checkpoint, save_decoder
    from adapter.decoder import Decoder
    from adapter.decoder_config import DecoderConfig
    from adapter.errors import AdapterError, CheckpointError, RecordError, TokenizerError
    from adapter.generation_config import GenerationConfig
    from adapter.image_projection import ImageProjectionConfig
    from adapter.methods.bias import BiasConfig
    from adapter.methods.full import FullConfig
    from adapter.methods.ia3 import IA3Config
    from adapter.methods.lora import LoraConfig
    from adapter.methods.v2 import V2Config
    from adapter.model import AdaptedModel
    from adapter.templates import ChatTemplate, PromptTemplate
    from adapter.tokenizers.base import Tokenizer
    from adapter.tokenizers.load import load_tokenizer

_MODULE_OF = {
    "AdaptedModel": "model",
    "AdapterError": "errors",
    "AdapterFile": "adapter_file",
    "AdaptionConfig": "adaption",
    "BiasConfig": "methods.bias",
    "CheckpointError": "errors",
    "FullConfig": "methods.full",
    "IA3Config": "methods.ia3",
    "LoraConfig": "methods.lora",
    "V2Config": "methods.v2",
    "GenerationConfig": "generation_config",
    "ImageProjectionConfig": "image_projection",
    "Decoder": "decoder",
    "DecoderConfig": "decoder_config",
    "ChatTemplate": "templates",
    "PromptTemplate": "templates",
    "RecordError": "errors",
    "Tokenizer": "tokenizers.base",
    "TokenizerError": "errors",
    "apply_adapter": "adapter_file",
    "export_adapter": "adapter_export",
    "extract_adapter": "adapter_file",
    "load_decoder": "base.checkpoint",
    "load_tokenizer": "tokenizers.load",
    "open_checkpoint": "base.checkpoint",
    "read_adapter": "adapter_formats",
    "save_decoder": "base.checkpoint",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name == "__version__":  # of the package that this library is installed with
        return import_module("importlib.metadata").version("rayjobs")
    if name in _MODULE_OF:
        return getattr(import_module(f"adapter.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'adapter' has no attribute {name!r}")
