"""Build an encoder of a shape that a file describes, in time and memory that its weights bound.

The JSON of a custom encoder states how many layers it has and how wide they are. One that is damaged, or that belongs
to another encoder, can ask for any number. The weights tell how large the encoder can be, so that building stops where
it goes beyond them, and a first build on PyTorch's meta device, where tensors take no memory, finds that out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.overrides import TorchFunctionMode

from cafo.errors import EncoderError

SPARE_TENSORS, SPARE_VALUES = 1000, 1 << 26
"""The most that an encoder may build beyond its weights: heads that it drops, masks and tables of positions."""
MOST_TENSORS, MOST_VALUES = 20_000, 1 << 32
"""The most that an encoder without weights may have: more than all but the largest that are published."""
LARGEST_SIDE = 4096
"""Largest side, in pixels, of an encoder's square images."""


class Bounds(NamedTuple):
    """The most that building an encoder may take."""

    tensors: int
    """number of parameters"""
    values: int
    """values of all parameters and buffers together"""
    message: str
    """what is wrong if it takes more"""

    @classmethod
    def of(cls, described: Path | str, state: Mapping[str, Tensor] | None, weights: Path | str) -> Bounds:
        """Return the bounds of an encoder that the file `described` describes; of `state` None, it is untrained."""
        way_out = "restore that file, or give the one of these weights"
        if state is None:
            message = f"{described} describes an encoder of over {MOST_TENSORS:,} tensors or {MOST_VALUES:,} values"
            return cls(MOST_TENSORS, MOST_VALUES, f"{message}; {way_out}")
        values = sum(tensor.numel() for tensor in state.values())
        held = f"{weights} holds {len(state):,} tensors of {values:,} values"
        message = f"{described} describes a far larger encoder than its weights: {held}; {way_out}"
        return cls(2 * len(state) + SPARE_TENSORS, 4 * values + SPARE_VALUES, message)


def build_within(make: Callable[[], nn.Module], bounds: Bounds) -> nn.Module:
    """Build a module, first without memory; it is as `make` alone would return it.

    Raises:
        EncoderError: it takes more than the bounds, found before it does.
    """
    try:
        with _counted(bounds), torch.device("meta"), _ShapesAlone(bounds):
            make()
    except EncoderError:
        raise
    except Exception:  # what no module can be built of, the build in memory says better
        pass
    with _counted(bounds):
        return make()


@contextmanager
def _counted(bounds: Bounds) -> Iterator[None]:
    """Raise EncoderError from the middle of a build, by this thread, that goes beyond the bounds."""
    thread, tensors, values = threading.get_ident(), 0, 0

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal tensors, values
        if tensor is None or threading.get_ident() != thread:
            return
        tensors += isinstance(tensor, nn.Parameter)
        values += tensor.numel()
        if tensors > bounds.tensors or values > bounds.values:
            raise EncoderError(bounds.message)

    hooks = (
        registration.register_module_parameter_registration_hook(count),
        registration.register_module_buffer_registration_hook(count),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _ShapesAlone(TorchFunctionMode):
    """Skip initial values, which on the meta device only import a compiler, and lists of a value for each layer.

    timm makes the latter before the layers, each layer's rate of stochastic depth, on the CPU.
    """

    def __init__(self, bounds: Bounds) -> None:
        super().__init__()
        self.bounds = bounds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else None
        if func is torch.linspace:
            steps = (kwargs or {}).get("steps", args[2] if len(args) > 2 else 0)
            if steps > self.bounds.tensors:
                raise EncoderError(self.bounds.message)
        return func(*args, **(kwargs or {}))


def check_side(side: Any, name: str) -> None:
    """Raise EncoderError unless an encoder's images have a side in pixels that can be computed."""
    if not isinstance(side, int) or not 0 < side <= LARGEST_SIDE:
        raise EncoderError(f"{name} reads images of side {side!r:.40}; it should be 1 to {LARGEST_SIDE} pixels")
