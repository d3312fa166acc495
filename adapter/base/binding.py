"""Match a checkpoint's tensors with a decoder's parameters, by name and shape, before any value is read."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from adapter.base.tensor_source import TensorSource
from adapter.decoder import Decoder
from adapter.decoder_config import DecoderConfig
from adapter.errors import CheckpointError
from adapter.methods.base import AdapterMethod


def meta_decoder(config: DecoderConfig, adapter: AdapterMethod | None = None) -> Decoder:
    """The decoder, with an adapter if one is given, on the meta device: names and shapes without memory."""
    with torch.device("meta"), _SkipInit():
        model = Decoder(config)
        if adapter is not None:
            model.add_adapter(adapter)
        return model


class _SkipInit(TorchFunctionMode):
    """Skip `torch.nn.init`. On the meta device it would only import a compiler, which takes seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def bind(
    config: DecoderConfig, sources: dict[str, TensorSource], key_of: Callable[[str], str], where: Path
) -> dict[str, TensorSource]:
    """The source of each of the decoder's parameters.

    Raises CheckpointError unless parameters and sources match exactly, in name and shape.
    """
    if config.n_layers > len(sources):  # checked before that many layers are built
        raise CheckpointError(f"{where}: {len(sources)} tensors cannot be a model of {config.n_layers} layers")
    expected = {name: tuple(parameter.shape) for name, parameter in meta_decoder(config).named_parameters()}
    keys = {key_of(name): name for name in expected}
    missing, unexpected = [key for key in keys if key not in sources], [key for key in sources if key not in keys]
    if missing or unexpected:
        faults = [f"{_some(missing)} missing"] * bool(missing) + [f"{_some(unexpected)} unexpected"] * bool(unexpected)
        raise CheckpointError(f"{where}: {'; '.join(faults)} for a model of {config.n_layers} layers")
    for key, name in keys.items():
        source = sources[key]
        if source.shape != expected[name]:
            hint = f" (joined from {len(source.parts)} shards; is one missing?)" if len(source.parts) > 1 else ""
            raise CheckpointError(
                f"{source.files[0]}: {key} has shape {source.shape}, the configuration wants {expected[name]}{hint}"
            )
        source.check_dtype(key)
    return {name: sources[key] for key, name in keys.items()}


def _some(keys: list[str]) -> str:
    return f"{', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
