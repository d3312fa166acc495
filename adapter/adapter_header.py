"""Read the own format of adapters: what the header states, checked against the tensors (see `adapter.adapter_file`)."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from adapter.adapter_file import (
    FORMAT,
    PROJECTION_PREFIX,
    PROMPT_VERSION,
    VERSION,
    VISION_KEYS,
    AdapterFile,
    some_keys,
    to_float32,
)
from adapter.adaption import AdaptionConfig
from adapter.base.tensor_files import read_metadata
from adapter.decoder_config import SIZES
from adapter.errors import AdapterError, CheckpointError
from adapter.image_projection import ImageProjection, ImageProjectionConfig
from adapter.json_object import parse_json
from adapter.methods.base import AdapterMethod
from adapter.methods.registry import METHODS
from adapter.templates import parse_template


def read_header(path: str | Path) -> AdapterFile:
    """Read what a file in the own format states. Its tensors stay unread, and the result has none.

    Raises CheckpointError, naming the file, for a file in another format or with a damaged header.
    """
    header = read_metadata(Path(path))
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not an adapter in this project's own format")
    return _parse_header(Path(path), header)


def parse_adapter(path: Path, header: dict[str, str], tensors: dict[str, Tensor]) -> AdapterFile:
    """The content of a file in the own format, given its header and tensors.

    Raises CheckpointError, naming the file, if the version or the method is unknown, the header is damaged, or the
    tensors of prompts are not those that the header states. Those of other methods are compared with their base.
    """
    file = _parse_header(path, header)
    if header["version"] == str(PROMPT_VERSION):
        _check_prompts(path, tensors, file.config)
    return replace(file, tensors={name: to_float32(tensor) for name, tensor in tensors.items()})


def _parse_header(path: Path, header: dict[str, str]) -> AdapterFile:
    if header.get("version") not in (str(PROMPT_VERSION), str(VERSION)):
        raise CheckpointError(
            f"{path}: format version {header.get('version')!r}; this code reads versions {PROMPT_VERSION} and {VERSION}"
        )
    of_prompts = header["version"] == str(PROMPT_VERSION)
    try:
        config = _parse_prompts(header) if of_prompts else _parse_method(header)
        base_shape, extra = parse_json(header["base_shape"]), parse_json(header["extra"])
        switches = parse_json(header.get("base_switches", "{}"))  # LLaMA's, where an older file says nothing
        templates = {name: parse_template(one) for name, one in parse_json(header.get("templates", "{}")).items()}
        if not all(isinstance(x, dict) for x in (base_shape, switches, extra)):
            raise AdapterError(f"base_shape {base_shape!r}, {switches!r}, extra {extra!r}")
        if unknown := base_shape.keys() - set(SIZES):
            raise AdapterError(f"base_shape holds {sorted(unknown)}")
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({error!r})") from error
    return AdapterFile(
        config=config,
        tensors={},
        base_shape=base_shape,
        base_switches=switches,
        base_fingerprint=header.get("base_fingerprint") or None,
        base_dtype=header.get("base_dtype") or None,
        tokenizer_sha256=header.get("tokenizer_sha256") or None,
        template=templates.pop("", None),
        format_templates=templates,
        extra=extra,
    )


def _parse_prompts(header: dict[str, str]) -> AdapterMethod:
    gate: Any = header["gate"]
    vision = _parse_vision(header["vision"]) if "vision" in header else None
    n_layers, prompt_length = int(header["n_layers"]), int(header["prompt_length"])
    return AdaptionConfig(n_layers=n_layers, prompt_length=prompt_length, gate=gate, vision=vision)


def _parse_method(header: dict[str, str]) -> AdapterMethod:
    if header["method"] not in METHODS:
        raise AdapterError(f"no method {header['method']!r}: there are {', '.join(METHODS)}")
    kind: Any = METHODS[header["method"]]
    settings = parse_json(header["settings"])
    if unknown := settings.keys() - {field.name for field in fields(kind)}:
        raise AdapterError(f"{header['method']} has no settings {sorted(unknown)}")
    if "vision" in header:
        settings["vision"] = _parse_vision(header["vision"])
    method: AdapterMethod = TypeAdapter(kind).validate_python(settings)
    return method


def _parse_vision(header: str) -> ImageProjectionConfig:
    values = parse_json(header)
    if not isinstance(values, dict) or not all(isinstance(width, int) for width in values.get("widths", [None])):
        raise AdapterError(f"vision {header}")
    names = {key: name for name, key in VISION_KEYS.items()}
    values = {names.get(key, key): value for key, value in values.items()}
    try:
        return ImageProjectionConfig(**{**values, "widths": tuple(values["widths"])})
    except TypeError as error:
        raise AdapterError(f"vision {header}: {error}") from error


def _check_prompts(path: Path, tensors: dict[str, Tensor], config: Any) -> None:
    """Raise CheckpointError unless the tensors are those of these prompts, in name and shape."""
    names = {"prompt", "gate"} | {PROJECTION_PREFIX + name for name in _projection_shapes(config.vision, 1)}
    if tensors.keys() != names:
        raise CheckpointError(f"{path}: expected the tensors {', '.join(sorted(names))}; {some_keys(tensors)}")
    prompt, gate, stated = tensors["prompt"], tensors["gate"], (config.n_layers, config.prompt_length)
    if prompt.dim() != 3 or gate.dim() != 2 or stated != prompt.shape[:2] or len(gate) != len(prompt):
        raise CheckpointError(
            f"{path}: prompt {tuple(prompt.shape)} and gate {tuple(gate.shape)} are not the {stated[0]} layers of "
            f"{stated[1]} prompts that the header states"
        )
    for name, shape in _projection_shapes(config.vision, prompt.shape[2]).items():
        if (given := tensors[PROJECTION_PREFIX + name].shape) != shape:
            raise CheckpointError(
                f"{path}: {PROJECTION_PREFIX}{name} has shape {tuple(given)}, the header states {shape}"
            )


def _projection_shapes(vision: ImageProjectionConfig | None, dim: int) -> dict[str, tuple[int, ...]]:
    if vision is None:
        return {}
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in ImageProjection(vision, dim).state_dict().items()}
