"""LLaMA-Adapter: a frozen LLaMA and the few parameters that teach it (arXiv 2303.16199). Pure PyTorch.

    from adapter import AdaptionConfig, AdaptedModel

    base = AdaptedModel.from_pretrained("llama-7b")                      # Meta's or Hugging Face's folder
    base.add_adapter(AdaptionConfig(n_layers=30, prompt_length=10))   # a fresh adapter, or
    base.load_adapter("adapter.safetensors")          # ours, official v1, litgpt, PEFT
    base.ask("Give three tips for staying healthy.")  # in the template that adapters are trained on
    base.generate(["Once upon a time"], max_new_tokens=64)
    base.logits(["Once upon a time"])                 # one (T, V) per text
    base.save_adapter("adapter.safetensors")

The names below are imported when they are first asked for, so `import adapter` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapter.adapter_checkpoint import AdapterFile, adapter_from, attach_file, export_v1, read_adapter
    from adapter.adaption import AdaptionConfig
    from adapter.base_checkpoint import load_llama, open_checkpoint, save_llama
    from adapter.decoder import Llama, LlamaConfig
    from adapter.errors import CheckpointError, TokenizerError
    from adapter.image_projection import ImageProjectionConfig
    from adapter.instruct import PromptTemplate
    from adapter.model import AdaptedModel
    from adapter.tokenizer import Tokenizer

__all__ = [
    "AdaptedModel",
    "AdapterFile",
    "AdaptionConfig",
    "CheckpointError",
    "ImageProjectionConfig",
    "Llama",
    "LlamaConfig",
    "PromptTemplate",
    "Tokenizer",
    "TokenizerError",
    "adapter_from",
    "attach_file",
    "export_v1",
    "load_llama",
    "open_checkpoint",
    "read_adapter",
    "save_llama",
]

_MODULES = (
    "errors",
    "adaption",
    "model",
    "adapter_checkpoint",
    "instruct",
    "decoder",
    "tokenizer",
    "image_projection",
    "base_checkpoint",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for room in _MODULES:
            module = import_module(f"adapter.{room}")
            if getattr(getattr(module, name, None), "__module__", None) == module.__name__:
                return getattr(module, name)
    raise AttributeError(f"module 'adapter' has no attribute {name!r}")
