"""Put an adapter into a transformers model, so that `generate`, pipelines and evaluation harnesses run with it.

    from adapter.hf import attach

    model = AutoModelForCausalLM.from_pretrained("llama-7b")
    handle = attach(model, "adapter.safetensors")
    model.generate(...)                                         # with the adapter
    handle.detach()                                             # the model is what it was

transformers lets a model's attention be replaced by a registered function. The one registered here calls the model's
own attention function, eager or SDPA, for the words, and calls it once more for the prompt, whose keys and values come
from the layer's own projections (and its norm of keys, where it has one). So masks, sliding windows, caches, soft caps
and scalings remain the model's own. Layers are changed in no other way.

Prompts and gates are float32 parameters of the model's attention modules, but are in no state dict: `save_pretrained`
writes what it would write without the adapter. To train them further, freeze the base first
(`model.requires_grad_(False)`), attach, train with any trainer, and call `AttachedAdapter.save`.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapter.adapter_file import PROJECTION_PREFIX, AdapterFile, check_identities, check_shape, to_float32
from adapter.adapter_formats import read_adapter
from adapter.adaption import AdaptionConfig, Gate
from adapter.base.checkpoint import open_checkpoint
from adapter.base.families import FAMILIES
from adapter.errors import AdapterError, CheckpointError
from adapter.hf_attention import PREFIX, AttachedAdaption, ImageTokens, register_attention
from adapter.tokenizers.load import load_tokenizer

_IMPLEMENTATIONS = ("eager", "sdpa")
_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "dense", "q_norm", "k_norm", "rotary_emb", "adaption"}
"""Parts of an attention that the prompt's keys and values either go through, or have nothing to do with."""
_IMAGES = "adaption_images"
"""Attribute of the decoder that holds an adapter's image projection."""


def attach(
    model: nn.Module, adapter: str | Path | AdapterFile, *, tokenizer: Any = None, gate: Gate | None = None
) -> "AttachedAdapter":
    """Put an adapter into a transformers model, in place of any that is attached.

    model: a causal language model of any family whose attention goes through transformers' AttentionInterface and
    has separate projections of keys and values (Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3, SmolLM3 and others), with
    the implementation `eager` or `sdpa`. adapter: a file of any format that `read_adapter` knows, or its content.
    tokenizer: the tokenizer in use, to be compared with the adapter's: its file or folder, or a transformers tokenizer
    that was loaded from a folder. gate: as in `read_adapter`.

    Raises CheckpointError if the adapter was made for a base of another shape or, where the model was loaded from a
    folder, of other weights, or for another tokenizer; AdapterError for a model that cannot take an adapter.
    """
    file = adapter if isinstance(adapter, AdapterFile) else read_adapter(adapter, gate=gate)
    if not isinstance(settings := file.config, AdaptionConfig):
        raise AdapterError(
            f"the adapter's method is {settings.method}, and only prompts can be attached to a transformers model: "
            "export a LoRA for the library peft, or merge the adapter and save the base"
        )
    decoder, attentions = _find_attentions(model)
    config = attentions[0].config
    implementation = config._attn_implementation.removeprefix(PREFIX)
    if implementation not in _IMPLEMENTATIONS:
        raise AdapterError(
            f"the model's attention runs as {implementation!r}, adapters run on {' and '.join(_IMPLEMENTATIONS)}: load "
            "it with attn_implementation='sdpa', or 'eager'"
        )
    check_shape(file, _base_sizes(config), _base_switches(config))
    check_identities(file, _folder_fingerprint(model, file), _tokenizer_sha256(tokenizer))
    register_attention(implementation)
    _detach(decoder, attentions)
    images = ImageTokens(file.vision, file.prompt.shape[2])
    if images.projection is not None:
        images.projection.load_state_dict(dict(file.projection))
        decoder.add_module(_IMAGES, images.to(_device(attentions[-1])))
    top = attentions[len(attentions) - settings.n_layers :]
    for attention, prompt, gates in zip(top, file.prompt, file.gate, strict=True):
        gates = gates.expand(config.num_attention_heads).clone()
        attention.adaption = AttachedAdaption(prompt.clone(), gates, settings.gate, images).to(_device(attention))
    config._attn_implementation = PREFIX + implementation
    decoder.register_forward_pre_hook(_before_forward, with_kwargs=True)
    return AttachedAdapter(decoder, file)


class AttachedAdapter:
    """An adapter in a transformers model. As a context manager it detaches the adapter at the end of the block."""

    def __init__(self, decoder: Any, file: AdapterFile) -> None:
        self._decoder, self._file = decoder, file
        self._adaptions = [layer.self_attn.adaption for layer in decoder.layers if hasattr(layer.self_attn, "adaption")]

    def __enter__(self) -> "AttachedAdapter":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Take the adapter out: the model is as it was before. Does nothing if another has taken its place."""
        attentions = [layer.self_attn for layer in self._decoder.layers]
        if attentions[-1]._modules.get("adaption") is self._adaptions[-1]:
            _detach(self._decoder, attentions)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The adapter's trainable parameters."""
        for module in [*self._adaptions, self._adaptions[0].images]:
            yield from (parameter for parameter in module.parameters() if parameter.requires_grad)

    @contextmanager
    def images(self, features: Sequence[Tensor | None]) -> Iterator[None]:
        """Show images to the model inside the block: the features (F,) of each row's image, or None where it has none.

        Beams and several answers to one prompt share the image of their row. Raises AdapterError for an adapter that
        reads no images, or features of another width.
        """
        tokens = self._adaptions[0].images
        if tokens.projection is None:
            raise AdapterError("the adapter was made for text alone and cannot read images")
        before = tokens.features, tokens.n_rows
        tokens.show(features)
        try:
            yield
        finally:
            tokens.features, tokens.n_rows = before

    def content(self) -> AdapterFile:
        """A copy of the adapter as it is now, with the identities that its file states."""
        tensors = {
            "prompt": torch.stack([to_float32(adaption.prompt) for adaption in self._adaptions]),
            "gate": torch.stack([to_float32(adaption.gate) for adaption in self._adaptions]),
        }
        if (projection := self._adaptions[0].images.projection) is not None:
            tensors |= {f"{PROJECTION_PREFIX}{name}": to_float32(one) for name, one in projection.state_dict().items()}
        return replace(self._file, tensors=tensors)

    def save(self, path: str | Path) -> None:
        """Write the adapter as it is now, in the own format."""
        self.content().save(path)


def _find_attentions(model: Any) -> tuple[Any, list[Any]]:
    """The decoder of a model, and the attention module of each of its layers.

    Raises AdapterError, naming the model's class, for one that cannot take an adapter.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    attentions = [getattr(layer, "self_attn", None) for layer in getattr(decoder, "layers", [])]
    faults = {f"layer {i}": fault for i, one in enumerate(attentions) if (fault := _describe_fault(one))}
    if not attentions:
        faults = {"it": "has no list of layers"}
    for where, fault in faults.items():
        raise AdapterError(f"{type(model).__name__} cannot take an adapter: {where} {fault}")
    return decoder, attentions


def _describe_fault(attention: Any) -> str:
    """Why a layer's attention cannot be adapted; empty if it can."""
    if not isinstance(attention, nn.Module):
        return "has no attention `self_attn`"
    names = inspect.unwrap(type(attention).forward).__globals__
    if not {"ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"} <= names.keys():
        return "does not go through transformers' AttentionInterface"
    parts = dict(chain(attention.named_children(), attention.named_parameters(recurse=False)))
    if not {"k_proj", "v_proj"} <= parts.keys():
        return "has no separate projections k_proj and v_proj"
    if unknown := sorted(parts.keys() - _PARTS):
        return f"has {', '.join(unknown)}, which adapters do not know"
    norm = getattr(parts.get("k_norm"), "weight", None)
    if norm is not None and norm.shape != (attention.head_dim,):
        return f"normalises its keys over {tuple(norm.shape)} channels, not over those of a head"
    return ""


def _device(attention: Any) -> torch.device:
    """The device of an attention's weights, which may be quantized. Raises AdapterError if they are not in memory."""
    device = next(chain(attention.k_proj.parameters(), attention.k_proj.buffers())).device
    if device.type == "meta":
        raise AdapterError("a part of the model's weights is offloaded: load all of it into memory, then attach")
    return device


def _detach(decoder: nn.Module, attentions: Sequence[Any]) -> None:
    """Undo `attach`, if there is anything to undo."""
    config = attentions[0].config
    config._attn_implementation = config._attn_implementation.removeprefix(PREFIX)
    for module in attentions:
        module._modules.pop("adaption", None)
    decoder._modules.pop(_IMAGES, None)
    for key in [key for key, hook in decoder._forward_pre_hooks.items() if hook is _before_forward]:
        del decoder._forward_pre_hooks[key], decoder._forward_pre_hooks_with_kwargs[key]


def _before_forward(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Check that the adapter is in use, and count positions from each row's first real token, as `generate` does.

    A base alone does not see where positions start, because RoPE is relative. The prompt's keys have no position, so an
    adapter does: a row that is padded on the left would answer differently.
    """
    implementation = decoder.layers[-1].self_attn.config._attn_implementation
    if not implementation.startswith(PREFIX):
        raise AdapterError(
            f"the model's attention was set to {implementation!r} after the adapter was attached, so that it would run "
            "without it: attach the adapter again, or detach it first"
        )
    mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if ids is None else ids
    if kwargs.get("position_ids") is None and isinstance(mask, Tensor) and mask.dim() == 2 and tokens is not None:
        kwargs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    return args, kwargs


def _base_sizes(config: Any) -> dict[str, int]:
    """`DecoderConfig.sizes` from a transformers configuration."""
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "hidden_dim": config.intermediate_size,
        "vocab_size": config.vocab_size,
    }


def _base_switches(config: Any) -> dict[str, Any] | None:
    """`DecoderConfig.switches` from a transformers configuration; None for a family that our decoder does not know."""
    if config.model_type not in FAMILIES:
        return None
    try:
        return FAMILIES[config.model_type].parse(config.to_dict(), Path("config.json")).decoder_config().switches()
    except AdapterError:
        return None  # a variant of the family that our decoder does not know


def _folder_fingerprint(model: Any, file: AdapterFile) -> str | None:
    """The fingerprint of the folder that the model was loaded from; None if there is none that can be read."""
    name = getattr(model.config, "_name_or_path", "")
    if not name or file.base_fingerprint is None or not Path(name, "config.json").is_file():
        return None
    try:
        return open_checkpoint(name).fingerprint()
    except CheckpointError:
        return None  # a family or a format that is only known to transformers: the shape has to do


def _tokenizer_sha256(tokenizer: Any) -> str | None:
    """The hash of a tokenizer that is given by its path or as an object; None if it cannot be known."""
    if tokenizer is None or hasattr(tokenizer, "sha256"):
        return getattr(tokenizer, "sha256", None)
    if not isinstance(tokenizer, str | Path):
        tokenizer = getattr(tokenizer, "name_or_path", "")
        if not tokenizer or not Path(tokenizer).is_dir():
            return None
    return load_tokenizer(tokenizer).sha256
