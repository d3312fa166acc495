"""Read encoder weights safely, and build CLIP with the activation that its weights were trained with.

A weight file does not record whether CLIP was trained with QuickGELU, x·σ(1.702x), or GELU. Both load and run, and the
wrong one loses several points of accuracy. The activation is taken from the first of these that is there:
- the model JSON beside the weights;
- open_clip's table, by pretrained tag or by the file's digest;
- three scalars that only OpenAI's archives hold;
- `quick_gelu`, stated by the caller.
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
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cafo.bounded_build import Bounds, build_within, check_side
from cafo.errors import CafoError, EncoderError
from cafo.files import describe_content, is_lfs_pointer, read_json
from cafo.images import CLIP_MEAN, CLIP_STD, Preprocess

State = dict[str, Tensor]

_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_OPENAI_SCALARS = ("input_resolution", "context_length", "vocab_size")
_WRAPPERS = ("teacher", "state_dict", "model", "student")
_PREFIX = re.compile(r"^(module\.|backbone\.|encoder\.)+")
_HEAD = re.compile(r"^(head|fc|classifier|projection_head|prototypes|last_layer|dino_head|ibot_head)\.")


class BuiltClip(NamedTuple):
    """A CLIP with its weights loaded, its tokenizer and its preprocessing."""

    model: nn.Module
    tokenizer: Any
    name: str
    architecture: str
    """the model's config as JSON"""
    preprocess: Preprocess


def read_state(path: Path) -> State:
    """Read the tensors of a weight file by name, from inside wrappers such as `teacher`. No code of the file is run.

    Raises:
        EncoderError: the file is missing, cut short, a Git LFS pointer or a TorchScript archive, or holds other objects
            than tensors.
    """
    if not path.is_file():
        raise EncoderError(
            f"no weight file {path}; give a local file, a folder, or a pretrained tag that open_clip knows"
        )
    if is_lfs_pointer(path):
        raise EncoderError(f"{path} is a Git LFS pointer, not the weights themselves; run `git lfs pull`")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise EncoderError(
                f"{path} is no whole safetensors file ({error}; {path.stat().st_size:,} bytes); download it again"
            ) from error
    if kind := describe_content(path):
        raise EncoderError(f"{path} is {kind}, not a file of weights; give a safetensors file or PyTorch's own")
    if _is_program(path):
        raise EncoderError(
            f"{path} is a TorchScript archive: a program, not a state dict. If you trust it, convert it once "
            "with `torch.save(torch.jit.load(path).state_dict(), new_path)`"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler does not check damaged content, so that any error may come of it
        if isinstance(error, pickle.UnpicklingError):  # of which PyTorch's own message says how to run its code
            held = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
            reason = f"it holds {held[1]}, and a pickle can run code" if held else "its pickle is no list of tensors"
        else:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EncoderError(
            f"{path} does not load as plain tensors ({reason}; {path.stat().st_size:,} bytes); if it was cut short, "
            "download it again, else save its state dict alone"
        ) from error
    while isinstance(content, Mapping) and (key := next((k for k in _WRAPPERS if _is_state(content.get(k))), None)):
        content = content[key]
    if not _is_state(content):
        raise EncoderError(f"{path} holds no state dict of named tensors")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _is_program(path: Path) -> bool:
    """Return whether a file is a TorchScript archive. One that is damaged is none: PyTorch says what it lacks."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def _is_state(content: Any) -> bool:
    return isinstance(content, Mapping) and any(isinstance(v, Tensor | Mapping) for v in content.values())


def clean_state(state: State, *, heads: bool = False) -> State:
    """Remove prefixes such as `module.` and `backbone.` from the names and, with `heads`, drop training heads."""
    clean = {_PREFIX.sub("", name): tensor for name, tensor in state.items()}
    return {name: t for name, t in clean.items() if not (heads and _HEAD.match(name))}


def load_state(module: nn.Module, state: Mapping[str, Tensor], path: Path | str) -> None:
    """Load a state dict into a module; every tensor of either must have its counterpart.

    Raises:
        EncoderError: tensors that are missing, left over or of another shape, or that hold NaN or infinity, with the
            first names of each.
    """
    own = module.state_dict()
    # older files lack batch norm's step counter, which inference does not use
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    extra = [n for n in state if n not in own]
    shapes = [
        f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}"
        for n in own
        if n in state and own[n].shape != state[n].shape
    ]
    if missing or extra or shapes:
        parts = [("missing", missing), ("not expected", extra), ("shape", shapes)]
        problems = "; ".join(f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in parts if names)
        raise EncoderError(f"{path} does not fit {type(module).__name__} ({problems}); check the architecture's name")
    # attention masks, which some files hold, are infinite on purpose
    masks = ("attn_mask", "attention_mask")
    if broken := [n for n, t in state.items() if not n.endswith(masks) and t.is_floating_point() and not _finite(t)]:
        raise EncoderError(
            f"{path}: {len(broken)} of {len(state)} tensors hold NaN or infinity ({', '.join(broken[:3])}); the file "
            "is damaged, or was saved in a type that is too small: get another copy"
        )
    module.load_state_dict(dict(state), strict=False)  # not strict because of the counters alone


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.float().isfinite().all())


def build_clip(name: str, weights: str, config: str = "", quick_gelu: bool | None = None) -> BuiltClip:
    """Build CLIP from open_clip's name and tag, from a local file or folder, or from a custom model JSON.

    The arguments are the fields of `EncoderSpec`.

    Raises:
        EncoderError: an unknown name or tag, a missing file, a model JSON that describes no CLIP or a far larger one
            than the weights, tensors that do not fit, or another activation than the weights were trained with.
    """
    path = Path(weights)
    clip = _find_config(name.replace("/", "-"), path, config)
    try:
        return _build_clip(clip, path, weights, quick_gelu)
    except Exception as error:  # open_clip takes the values of a JSON as they are, so that any error may come of them
        if clip.built_in or isinstance(error, CafoError | OSError):
            raise
        raise EncoderError(
            f"the model JSON of {clip.name}, {clip.file}, describes no CLIP that open_clip can build "
            f"({type(error).__name__}: {' '.join(str(error).split())}); restore it, or give the one of these weights"
        ) from error


def _build_clip(clip: _ClipConfig, path: Path, weights: str, quick_gelu: bool | None) -> BuiltClip:
    if weights.startswith("random:"):
        return _assemble(clip, None, path, seed=int(weights.removeprefix("random:")))
    file, entry = _find_weights(clip, path, weights)
    state = clean_state(read_state(file))
    quick_gelu_built = bool(clip.model.get("quick_gelu", False))
    if clip.built_in:
        entry = entry or _published_entry(file)
        clip = clip._replace(preprocess=entry)
        trained = bool(entry.get("quick_gelu", False)) if entry else quick_gelu
        if all(scalar in state for scalar in _OPENAI_SCALARS):
            trained = True
        _check_activation(clip.name, quick_gelu_built, trained, quick_gelu, weights)
    elif quick_gelu is not None and quick_gelu != quick_gelu_built:
        raise EncoderError(f"the model JSON of {weights} says quick_gelu={not quick_gelu}, the config {quick_gelu}")
    for scalar in _OPENAI_SCALARS:
        state.pop(scalar, None)
    return _assemble(clip, state, file)


class _ClipConfig(NamedTuple):
    """The architecture and preprocessing of a CLIP."""

    name: str
    model: dict[str, Any]
    """open_clip's model config"""
    preprocess: Mapping[str, Any]
    file: Path | None
    """the model JSON; None of an architecture that open_clip knows by its name"""

    @property
    def built_in(self) -> bool:
        """open_clip knows the architecture by its name."""
        return self.file is None


def _find_config(name: str, path: Path, config: str) -> _ClipConfig:
    """Return the config of a custom CLIP if a JSON is given or lies beside the weights, else open_clip's by name."""
    custom = _read_custom_config(weight_file(path), config) if path.exists() or config else None
    if custom is not None:
        return _ClipConfig(name or (path.name if path.is_dir() else path.stem), *custom)
    model = open_clip.get_model_config(name)
    if model is None:
        raise EncoderError(f"open_clip has no architecture {name!r}; `open_clip.list_models()` lists them")
    return _ClipConfig(name, model, {}, None)


def _find_weights(clip: _ClipConfig, path: Path, weights: str) -> tuple[Path, dict[str, Any]]:
    """Return the weight file, downloaded if `weights` is a pretrained tag, and open_clip's entry of that tag, or {}."""
    if path.exists():
        return weight_file(path), {}
    entry = open_clip.get_pretrained_cfg(clip.name, weights) if clip.built_in else {}
    if entry:
        return Path(open_clip.download_pretrained(entry)), entry
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(clip.name)) or "none"
    raise EncoderError(f"{weights!r} is neither a file, nor a folder, nor a tag of {clip.name} (its tags: {tags})")


def _assemble(clip: _ClipConfig, state: State | None, path: Path, seed: int = 0) -> BuiltClip:
    """Build a CLIP and load its weights; with `state` None, they are random by `seed`."""
    name, architecture, config = clip.name, json.dumps(clip.model, sort_keys=True), copy.deepcopy(clip.model)
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "multimodal_cfg" in config:
        raise EncoderError(f"{name} is a captioning model (CoCa); CaFo needs a plain CLIP")
    config["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False

    def make() -> nn.Module:
        torch.manual_seed(seed)
        return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)

    with torch.random.fork_rng(devices=[]):
        model: Any = make() if clip.file is None else build_within(make, Bounds.of(clip.file, state, path))
    if state is not None:
        if custom and "positional_embedding" in state:
            state = open_clip.model.convert_to_custom_text_state_dict(state)
        if "logit_scale" in state:
            state["logit_scale"] = state["logit_scale"].reshape(model.logit_scale.shape)
        load_state(model, state, path)
    window = config["text_cfg"].get("context_length", 77)
    tokenizer = open_clip.get_tokenizer(name) if clip.built_in else open_clip.SimpleTokenizer(context_length=window)
    vocabulary = config["text_cfg"].get("vocab_size", 49408)
    if isinstance(tokenizer, open_clip.SimpleTokenizer) and vocabulary < tokenizer.vocab_size:
        raise EncoderError(
            f"{name} has a vocabulary of {vocabulary} tokens; CLIP's tokenizer needs {tokenizer.vocab_size}"
        )
    return BuiltClip(model, tokenizer, name, architecture, _clip_preprocess(name, model, clip.preprocess))


def _clip_preprocess(name: str, model: nn.Module, given: Mapping[str, Any]) -> Preprocess:
    size: Any = model.visual.image_size  # type: ignore[union-attr]
    side = size if isinstance(size, int) else size[0]
    check_side(side, name)
    mode = given.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash") or (not isinstance(size, int) and len({*size}) > 1):
        raise EncoderError(
            f"{name} needs images of {size} with resize mode {mode!r}; only square images with shortest or squash are "
            "supported"
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
    """Return the path of a weight file, or of the weight file in a folder in open_clip's or timm's format.

    Raises:
        EncoderError: the folder has no weight file, or several of which none has the format's standard name.
    """
    if not path.is_dir():
        return path
    standard = [path / name for name in ("open_clip_model.safetensors", "model.safetensors") if (path / name).is_file()]
    files = standard[:1] or sorted(p for p in path.iterdir() if p.suffix in _WEIGHT_SUFFIXES)
    if len(files) != 1:
        listed = ", ".join(p.name for p in files) or "none"
        raise EncoderError(
            f"{path} should hold one weight file ({', '.join(_WEIGHT_SUFFIXES)}), found {listed}; give the file"
        )
    return files[0]


def config_beside(weights: Path) -> Path | None:
    """Return the JSON beside a custom CLIP's weight file: `<weights>.json` or `open_clip_config.json`, else None."""
    names = (weights.with_suffix(".json"), weights.with_name("open_clip_config.json"))
    return next((path for path in names if path.is_file()), None)


def _read_custom_config(weights: Path, config: str) -> tuple[dict, dict, Path] | None:
    """Read a custom CLIP's model and preprocessing config, and their file: the JSON given or the one beside."""
    path = Path(config) if config else config_beside(weights)
    if path is None:
        return None
    content = read_json(path, "give an open_clip model JSON")
    model = content.get("model_cfg", content) if isinstance(content, dict) else {}
    if not isinstance(model, dict):
        raise EncoderError(f"{path} is not an open_clip model JSON: its model_cfg is no object")
    if lacking := {"embed_dim", "vision_cfg", "text_cfg"} - set(model):
        raise EncoderError(f"{path} is not an open_clip model JSON: it lacks {', '.join(sorted(lacking))}")
    return model, content.get("preprocess_cfg", {}), path


def _published_entry(path: Path) -> dict[str, Any]:
    """Return open_clip's entry for a local copy of a published file, found by the digest in its URL, else {}."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    digest = sha256.hexdigest()
    for architecture, tag in open_clip.list_pretrained():
        entry = open_clip.get_pretrained_cfg(architecture, tag)
        url = entry.get("url", "")
        if f"/{digest}/" in url or f"-{digest[:8]}.pt" in url:
            return entry
    return {}


def _check_activation(name: str, built: bool, trained: bool | None, stated: bool | None, weights: str) -> None:
    """Check that an architecture has the activation that its weights were trained with.

    Args:
        built: the architecture has QuickGELU.
        trained: the weights were trained with QuickGELU; None if that is unknown.
        stated: what the caller says of the weights.
    """
    plain = name.removesuffix("-quickgelu")
    variants = {plain, f"{plain}-quickgelu"} & set(open_clip.list_models())
    if trained is None:
        if built or len(variants) < 2:
            return  # the name says QuickGELU, or the architecture has one variant only
        raise EncoderError(
            f"{weights} does not tell whether it was trained with QuickGELU, and {name} means GELU; set quick_gelu to "
            f"true (then name {plain}-quickgelu) or false, or put the model's JSON beside the file"
        )
    if stated is not None and stated != trained:
        raise EncoderError(
            f"{weights} is known to be trained with quick_gelu={trained}, but quick_gelu={stated} is stated"
        )
    if trained != built:
        fitting = f"{plain}-quickgelu" if trained else plain
        words = ("QuickGELU", "GELU") if trained else ("GELU", "QuickGELU")
        raise EncoderError(f"{weights} was trained with {words[0]}, but {name} computes {words[1]}; use {fitting}")
