"""The protocol of adapter methods, and the parts that they add to a frozen decoder.

A decoder has three kinds of places for a part, and computes exactly its base where a place is empty:

    attention.adaption      adds a term to the attention's output                   adaption(q, k, v, …) → (B, H, T, D)
    a linear layer's delta  changes the output y = W x of the layer for its input x        delta(x, y)   → (…, O)
    a norm's shift          changes the norm's weight                                      shift(weight) → (C,)

Parts are modules of their own, so that the base's parameters keep their names, a quantized layer can hold one, ZeRO-3
gathers a part when it is called, and taking the parts off gives the base back to the bit. All trained values are
float32, whatever the base is held in, and every part starts as the identity.

O outputs, I inputs of a linear layer, C width, N layers of the base.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Self

from adapter.decoder_config import DecoderConfig
from adapter.errors import AdapterError

if TYPE_CHECKING:
    from adapter.decoder import Decoder
    from adapter.image_projection import ImageProjectionConfig

LINEARS = {
    **{name: f"attention.{name}" for name in ("wq", "wk", "wv", "wo")},
    **{name: f"feed_forward.{name}" for name in ("w1", "w2", "w3")},
}
"""The linear layers of a block: short name → path within the block."""


class AdapterPart(nn.Module):
    """A module that an adapter adds to a decoder, with trainable parameters in float32."""

    of_images = False
    """The part is the images' own: where a method separates images, it is trained by records with an image alone."""
    learns = True
    """The records that run now train the part; if not, it computes the same and its gradient is 0."""

    def trained(self, parameter: Tensor) -> Tensor:
        """The parameter, as the part should use it: its gradient is 0 while the part does not learn."""
        return parameter if self.learns else _WithoutGradient.apply(parameter)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Give the parameters their initial values; the generator's device is the part's own."""
        raise NotImplementedError


class _WithoutGradient(torch.autograd.Function):
    """The same values, with a gradient of 0 and not of None: all workers must have gradients of the same parameters."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        return torch.zeros_like(upstream[0])


class Delta(AdapterPart):
    """A part of a linear layer: changes the layer's output y (…, O), given its input x (…, I)."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight (O, I) and bias (O,), in float32, of a plain layer that computes what layer and part compute."""
        raise NotImplementedError


class AdapterMethod(Protocol):
    """An adapter method with its settings: a frozen dataclass, whose fields are the settings.

    A method must define `method` and `install`. What else stands here fits a method that adds parts to the top layers
    and saves its tensors under the decoder's own names.
    """

    @property
    def method(self) -> str:
        """The method's name in `adapter.methods.registry.METHODS`."""
        ...

    @property
    def n_layers(self) -> int | None:
        """Number of adapted layers, counted from the top; None for all."""
        ...

    def install(self, model: "Decoder") -> None:
        """Put the parts in their places, with any values, and set `requires_grad` of what is trained besides.

        The base is frozen and holds no parts when this is called.
        """
        ...

    @property
    def vision(self) -> "ImageProjectionConfig | None":
        """The image projection of an adapter that reads images; None for text alone."""
        return None

    @property
    def separates_images(self) -> bool:
        """True if records with an image and those without one train disjoint parameters: the parts of images, and all
        others."""
        return False

    @property
    def trains_base(self) -> bool:
        """True if the base's own weights are trained, so that there is nothing to take off."""
        return False

    @property
    def usual_lr(self) -> float | None:
        """AdamW's peak learning rate at 256 records that a published recipe comes to; None if there is none."""
        return None

    @property
    def untrained_tensors(self) -> frozenset[str]:
        """Names of saved tensors that are fixed, not trained."""
        return frozenset()

    def check_precision(self, precision: str) -> None:
        """Raise AdapterError if the method cannot train on a base that is held in this precision."""
        return None

    def check(self, base: DecoderConfig) -> None:
        """Raise AdapterError, with the way out, if a base of this shape cannot take the adapter."""
        if self.n_layers is not None and self.n_layers > base.n_layers:
            raise AdapterError(
                f"the adapter wants {self.n_layers} adapted layers, the base has {base.n_layers}: "
                f"set n_layers to at most {base.n_layers}"
            )

    def first_layer(self, n_layers: int) -> int:
        """The lowest layer that needs gradients, in a base of N = `n_layers`."""
        return 0 if self.n_layers is None else n_layers - self.n_layers

    def on_top(self, n_layers: int) -> Self:
        """The same method, without images, as it is in a base whose adapted layers are these top ones."""
        changed: Any = self
        return replace(changed, n_layers=n_layers)

    def describe(self) -> str:
        """The adapter's shape, as a phrase for tables and cards."""
        where = "all layers" if self.n_layers is None else f"the top {self.n_layers} layers"
        return f"{self.method} in {where}"

    def header(self) -> dict[str, str]:
        """The entries of an adapter file's header that state the method and its settings, but for `vision`."""
        fields: Any = self
        settings = {name: value for name, value in asdict(fields).items() if name != "vision"}
        return {"method": self.method, "settings": json.dumps(settings)}

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as an adapter file holds them, given the decoder's, by parameter name."""
        return dict(tensors)

    def unpack(self, tensors: Mapping[str, Tensor], base: DecoderConfig) -> dict[str, Tensor]:
        """The inverse of `pack`, for a base of this shape."""
        return dict(tensors)

    def sizes(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """The sizes of the base (`DecoderConfig.sizes`) that the tensors of a file imply, as far as its header may not
        state them."""
        return {}


def check_layers(n_layers: int | None) -> None:
    """Raise AdapterError unless the number of adapted layers is positive, or None for all."""
    if n_layers is not None and n_layers < 1:
        raise AdapterError(f"an adapter needs n_layers >= 1, got {n_layers}")


def install_deltas(
    model: "Decoder", n_layers: int | None, names: Sequence[str], make: Callable[[int, int], Delta]
) -> None:
    """Put a delta on the linear layers of these short names, in the top `n_layers` blocks or, if None, in all.

    make: returns a new part for a layer of I inputs and O outputs, make(I, O).
    """
    for block in list(model.blocks)[-n_layers if n_layers else None :]:
        for name in names:
            linear: Any = block.get_submodule(LINEARS[name])
            linear.delta = make(linear.in_features, linear.out_features)


def deltas(model: "Decoder") -> Iterator[tuple[str, Any, Delta]]:
    """Path, linear layer and delta of every layer that holds one, lowest block first."""
    for path, module in model.named_modules():
        if isinstance(delta := getattr(module, "delta", None), Delta):
            yield path, module, delta
