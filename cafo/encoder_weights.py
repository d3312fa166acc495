"""Weights into towers: reading state dicts safely, and building CLIP with the activation its weights were trained with.

Nothing in a weight file tells whether a CLIP was trained with QuickGELU, x·σ(1.702x), or GELU: both load, both run,
and the wrong one loses several points. What does tell, in this order: the model JSON that lies beside the weights;
open_clip's table, by pretrained tag or by the digest that it records for a file; the three scalars that only OpenAI's
archives carry. Where none speaks, the caller must.
"""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cafo.errors import CafoError
from cafo.files import read_json
from cafo.images import CLIP_MEAN, CLIP_STD, Preprocess

State = dict[str, Tensor]

_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_OPENAI_SCALARS = ("input_resolution", "context_length", "vocab_size")
_WRAPPERS = ("teacher", "state_dict", "model", "student")
_PREFIX = re.compile(r"^(module\.|backbone\.|encoder\.)+")
_HEAD = re.compile(r"^(head|fc|classifier|projection_head|prototypes|last_layer|dino_head|ibot_head)\.")


class BuiltClip(NamedTuple):
    """A CLIP with its weights in, and what belongs to it."""

    model: nn.Module
    tokenizer: Any
    name: str
    architecture: str
    """its model JSON"""
    preprocess: Preprocess


def read_state(path: Path) -> State:
    """Tensors of a weight file by name; wrappers such as `teacher` opened. No object of the file is ever built.

    Raises:
        ValueError: missing; a TorchScript archive; anything but tensors inside.
    """
    if not path.is_file():
        raise CafoError(f"no weight file {path}; give a local file, a folder, or a pretrained tag that open_clip knows")
    if path.suffix == ".safetensors":
        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any("/code/" in name for name in archive.namelist()):
                raise CafoError(
                    f"{path} is a TorchScript archive: a program, not a state dict. If you trust it, convert it once "
                    "with `torch.save(torch.jit.load(path).state_dict(), new_path)`"
                )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise CafoError(f"{path} does not load as plain tensors ({reason}); save its state dict alone") from error
    while isinstance(content, Mapping) and (key := next((k for k in _WRAPPERS if _is_state(content.get(k))), None)):
        content = content[key]
    if not _is_state(content):
        raise CafoError(f"{path} holds no state dict of named tensors")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _is_state(content: Any) -> bool:
    return isinstance(content, Mapping) and any(isinstance(v, Tensor | Mapping) for v in content.values())


def clean_state(state: State, *, heads: bool = False) -> State:
    """Names without the wrappers' prefixes (`module.`, `backbone.`); with `heads`, training heads are left out."""
    clean = {_PREFIX.sub("", name): tensor for name, tensor in state.items()}
    return {name: t for name, t in clean.items() if not (heads and _HEAD.match(name))}


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], path: Path | str) -> None:
    """Load every tensor into its place.

    Raises:
        ValueError: a missing, a left-over or a wrongly shaped tensor, with the first names of each.
    """
    own = module.state_dict()
    # batch norm's step counter is no weight, and older files lack it
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    extra = [n for n in state if n not in own]
    shapes = [
        f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}"
        for n in own
        if n in state and own[n].shape != state[n].shape
    ]
    if missing or extra or shapes:
        parts = [("missing", missing), ("not expected", extra), ("shape", shapes)]
        told = "; ".join(f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in parts if names)
        raise CafoError(f"{path} does not fit {type(module).__name__} ({told}); check the architecture's name")
    module.load_state_dict(dict(state), strict=False)  # the counters; all else was just proven


def build_clip(name: str, weights: str, config: str = "", quick_gelu: bool | None = None) -> BuiltClip:
    """CLIP by open_clip's name and tag, by local file or folder, or by a model JSON of one's own.

    Raises:
        ValueError: as `load_encoder`.
    """
    name = name.replace("/", "-")
    path = Path(weights)
    local = path.exists()
    file = weight_file(path)
    own = _own_config(file, config) if local or config else None
    if own is not None:
        model_config, preprocess_config = own
        name = name or (path.name if path.is_dir() else path.stem)
    else:
        model_config, preprocess_config = open_clip.get_model_config(name), {}
        if model_config is None:
            raise CafoError(f"open_clip has no architecture {name!r}; `open_clip.list_models()` lists them")
    if weights.startswith("random:"):
        return _assemble(name, model_config, preprocess_config, own is None, None, path, int(weights[7:]))

    tag = open_clip.get_pretrained_cfg(name, weights) if not local and own is None else {}
    if tag:
        file = Path(open_clip.download_pretrained(tag))
    elif not local:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise CafoError(f"{weights!r} is neither a file, nor a folder, nor a tag of {name} (its tags: {tags})")
    state = clean_state(read_state(file))
    if own is None:
        tag = tag or _published(file)
        preprocess_config = preprocess_config or tag
        trained = bool(tag.get("quick_gelu", False)) if tag else quick_gelu
        if all(scalar in state for scalar in _OPENAI_SCALARS):
            trained = True
        _match_activation(name, bool(model_config.get("quick_gelu", False)), trained, quick_gelu, weights)
    elif quick_gelu is not None and quick_gelu != bool(model_config.get("quick_gelu", False)):
        raise CafoError(f"the model JSON of {weights} says quick_gelu={not quick_gelu}, the config {quick_gelu}")
    for scalar in _OPENAI_SCALARS:
        state.pop(scalar, None)
    return _assemble(name, model_config, preprocess_config, own is None, state, file, 0)


def _assemble(
    name: str, config: dict, preprocess: Mapping[str, Any], built_in: bool, state: State | None, path: Path, seed: int
) -> BuiltClip:
    architecture, config = json.dumps(config, sort_keys=True), copy.deepcopy(config)
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "multimodal_cfg" in config:
        raise CafoError(f"{name} is a captioner (CoCa); CaFo needs a plain CLIP")
    config["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
    if state is not None:
        if custom and "positional_embedding" in state:
            state = open_clip.model.convert_to_custom_text_state_dict(state)
        if "logit_scale" in state:
            state["logit_scale"] = state["logit_scale"].reshape(model.logit_scale.shape)
        load_exactly(model, state, path)
    window = config["text_cfg"].get("context_length", 77)
    tokenizer = open_clip.get_tokenizer(name) if built_in else open_clip.SimpleTokenizer(context_length=window)
    vocabulary = config["text_cfg"].get("vocab_size", 49408)
    if isinstance(tokenizer, open_clip.SimpleTokenizer) and vocabulary < tokenizer.vocab_size:
        raise CafoError(f"{name} has room for {vocabulary} tokens; CLIP's tokenizer has {tokenizer.vocab_size}")
    return BuiltClip(model, tokenizer, name, architecture, _clip_preprocess(name, model, preprocess))


def _clip_preprocess(name: str, model: nn.Module, given: Mapping[str, Any]) -> Preprocess:
    size: Any = model.visual.image_size  # type: ignore[union-attr]
    side = size if isinstance(size, int) else size[0]
    mode = given.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash") or (not isinstance(size, int) and len({*size}) > 1):
        raise CafoError(
            f"{name} wants images of {size}, resize mode {mode!r}; only squares, shortest or squash, are known"
        )
    return Preprocess(
        size=side,
        resize=side,
        mode=mode,
        interpolation="bilinear" if given.get("interpolation") == "bilinear" else "bicubic",
        mean=tuple(given.get("mean") or CLIP_MEAN),
        std=tuple(given.get("std") or CLIP_STD),
    )


def weight_file(path: Path) -> Path:
    """The file itself, or the one that a folder in open_clip's or timm's format holds.

    Raises:
        ValueError: a folder with no weight file, or several of which none has the format's own name.
    """
    if not path.is_dir():
        return path
    found = [path / name for name in ("open_clip_model.safetensors", "model.safetensors") if (path / name).is_file()]
    found = found[:1] or sorted(p for p in path.iterdir() if p.suffix in _WEIGHT_SUFFIXES)
    if len(found) != 1:
        listed = ", ".join(p.name for p in found) or "none"
        raise CafoError(
            f"{path} should hold one weight file ({', '.join(_WEIGHT_SUFFIXES)}), found {listed}; give the file"
        )
    return found[0]


def config_beside(weights: Path) -> Path | None:
    """A custom CLIP's JSON beside its weight file: `<weights>.json`, or `open_clip_config.json`."""
    beside = (weights.with_suffix(".json"), weights.with_name("open_clip_config.json"))
    return next((path for path in beside if path.is_file()), None)


def _own_config(weights: Path, config: str) -> tuple[dict, dict] | None:
    """Model and preprocessing of a custom CLIP's JSON: the one given, or the one beside."""
    path = Path(config) if config else config_beside(weights)
    if path is None:
        return None
    content = read_json(path, "give an open_clip model JSON")
    model = content.get("model_cfg", content) if isinstance(content, dict) else {}
    if lacking := {"embed_dim", "vision_cfg", "text_cfg"} - set(model):
        raise CafoError(f"{path} is no open_clip model JSON: it lacks {', '.join(sorted(lacking))}")
    return model, content.get("preprocess_cfg", {})


def _published(path: Path) -> dict[str, Any]:
    """open_clip's entry for a local copy of a published file, known by the digest in the file's address; or nothing."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    digest = sha256.hexdigest()
    for architecture, tag in open_clip.list_pretrained():
        entry = open_clip.get_pretrained_cfg(architecture, tag)
        address = entry.get("url", "")
        if f"/{digest}/" in address or f"-{digest[:8]}.pt" in address:
            return entry
    return {}


def _match_activation(name: str, built: bool, trained: bool | None, stated: bool | None, weights: str) -> None:
    plain = name.removesuffix("-quickgelu")
    variants = {plain, f"{plain}-quickgelu"} & set(open_clip.list_models())
    if trained is None:
        if built or len(variants) < 2:
            return  # the name says QuickGELU in so many words, or there is nothing to confuse
        raise CafoError(
            f"{weights} does not tell whether it was trained with QuickGELU, and {name} means GELU; state quick_gelu: "
            f"true (then name {plain}-quickgelu) or false, or put the model's JSON beside the file"
        )
    if stated is not None and stated != trained:
        raise CafoError(
            f"{weights} is known to be trained with quick_gelu={trained}, but quick_gelu={stated} is stated"
        )
    if trained != built:
        right = f"{plain}-quickgelu" if trained else plain
        words = ("QuickGELU", "GELU") if trained else ("GELU", "QuickGELU")
        raise CafoError(f"{weights} was trained with {words[0]}, but {name} computes {words[1]}; use {right}")
