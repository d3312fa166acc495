"""Adapter methods, each a file that opens with its paper and equations, under one protocol.

A method is a frozen dataclass of its settings that follows `AdapterMethod` of `adapter.methods.base`: it puts trainable
parts on a frozen decoder, and says what is trained and saved. Training, generation and files do not know which method
they handle. A new one is one file, one line below, and one test against its equations or another implementation.
"""

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from adapter.adaption import METHOD_GATES, AdaptionConfig
from adapter.errors import AdapterError
from adapter.image_projection import ImageProjectionConfig
from adapter.methods.base import AdapterMethod
from adapter.methods.bias import BiasConfig
from adapter.methods.full import FullConfig
from adapter.methods.ia3 import IA3Config
from adapter.methods.lora import LoraConfig
from adapter.methods.v2 import V2Config

METHODS: Mapping[str, type[AdapterMethod]] = MappingProxyType(
    {
        "zero_init": AdaptionConfig,
        "rand_init": AdaptionConfig,
        "prefix": AdaptionConfig,
        "v2": V2Config,
        "lora": LoraConfig,
        "ia3": IA3Config,
        "bias": BiasConfig,
        "full": FullConfig,
    }
)
"""The methods by the names that settings, headers and results use."""


def make_method(name: str, *, vision: ImageProjectionConfig | None = None, **settings: Any) -> AdapterMethod:
    """A method with those of the settings that it has; the others are left out, and None stands for a default.

    vision: the image projection of an adapter that reads images. Raises AdapterError for a name that is not in
    `METHODS`, for a method that cannot read images, and for settings out of range.
    """
    if name not in METHODS:
        raise AdapterError(f"no adapter method {name!r}: there are {', '.join(METHODS)}")
    known = {field.name for field in fields(METHODS[name])}  # type: ignore[arg-type]
    given = {key: value for key, value in settings.items() if key in known and value is not None}
    if vision is not None:
        if "vision" not in known:
            raise AdapterError(
                f"the method {name} reads no images: leave out vision, or take {', '.join(METHOD_GATES)}, to whose "
                "prompts an image is added, or v2"
            )
        given["vision"] = vision
    if name in METHOD_GATES:
        given["gate"] = METHOD_GATES[name]
    return METHODS[name](**given)
