"""Read LLaMA checkpoints, in Meta's or Hugging Face's format, into the decoder one tensor at a time; write the latter.

Meta's folders hold `params.json` and `consolidated.00.pth`, ..., the model-parallel shards of one model. Hugging Face's
hold `config.json` and `model.safetensors` or `pytorch_model.bin`, as one file or as indexed shards.

`open_checkpoint` maps the files, reads names and shapes, and checks that they are the model that the configuration
states, before any value is read. In Meta's format, wq and wk are made for rotating adjacent pairs; their rows are
permuted, so that the decoder can rotate halves.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from adapter.atomic_file import atomic_path
from adapter.base.config import HFConfig, HFIndex, MetaConfig, hf_config
from adapter.base.quantization import Precision, Quantization, precision_of, reading_dtype, set_weight
from adapter.base.tensor_files import drop_pages, open_tensors
from adapter.base.tensor_source import TensorSource
from adapter.decoder import Decoder
from adapter.decoder_config import DecoderConfig
from adapter.errors import AdapterError, CheckpointError

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SHARD_DIM = {"wo": 1, "w2": 1, "wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0}  # norms are replicated
_HF_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_HF_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose names and shapes were checked against `config`, but whose values were not read yet."""

    path: Path
    config: DecoderConfig
    tokenizer_path: Path | None
    """`tokenizer.model` in the folder or, in Meta's layout alone, beside it; None if there is none."""
    _sources: dict[str, TensorSource] = field(repr=False)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) under the decoder's names, on the CPU, in the checkpoint's dtype, one at a time.

        A tensor may be a view of the file: copy it, never write to it. Its memory is returned when the next tensor is
        requested. A tied head is not repeated. Raises CheckpointError, naming file and tensor, for NaN or infinity.
        """
        for name, source in self._sources.items():
            tensor = source.read()
            source.check_finite(tensor, name)
            yield name, tensor
            del tensor
            for part in source.parts:
                drop_pages(part)

    def fingerprint(self) -> str:
        """Identify the base by its values, independent of the files' format, sharding and precision.

        A SHA-256, in hexadecimal, over the shape, all norms, and three rows of every matrix in float32. The first call
        reads tens of megabytes at 13B; later calls read nothing.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        config = self.config
        shape = (config.dim, config.n_layers, config.n_heads, config.n_kv_heads, config.hidden_dim, config.vocab_size)
        digest = hashlib.sha256(repr(shape).encode())
        sources = dict(self._sources)
        sources.setdefault("output.weight", sources["tok_embeddings.weight"])
        for name in sorted(sources):
            source = sources[name]
            digest.update(name.encode())
            if len(source.shape) == 1:
                digest.update(source.read().float().numpy().tobytes())
                continue
            for row in (0, source.shape[0] // 2, source.shape[0] - 1):
                digest.update(source.row(row).float().numpy().tobytes())
        return digest.hexdigest()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a folder in Meta's or Hugging Face's format; no value is read yet.

    Raises CheckpointError, naming file and key, for a folder in neither format, an unsupported architecture, missing or
    unexpected keys, wrong shapes, truncated files, and pickles that hold more than tensors.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: not a folder; give the folder that holds params.json or config.json")
    if (path / "config.json").is_file():
        config, sources = _open_hf(path)
    elif (path / "params.json").is_file():
        config, sources = _open_meta(path)
    else:
        raise CheckpointError(f"{path}: neither config.json (Hugging Face) nor params.json (Meta) is in this folder")
    return Checkpoint(path, config, _find_tokenizer(path), sources)


def _find_tokenizer(path: Path) -> Path | None:
    """The `tokenizer.model` of a checkpoint's folder.

    One beside the folder is used for Meta's layout alone, whose first release has one tokenizer beside `7B/`, `13B/`,
    ..., and only for a folder without a tokenizer of its own. Elsewhere it is a neighbour's.
    """
    if (path / "tokenizer.model").is_file():
        return path / "tokenizer.model"
    beside = path.absolute().parent / "tokenizer.model"
    has_own = (path / "config.json").is_file() or (path / "tokenizer.json").is_file()
    return beside if beside.is_file() and not has_own else None


def meta_decoder(config: DecoderConfig) -> Decoder:
    """The decoder on the meta device: names and shapes without memory."""
    with torch.device("meta"), _SkipInit():
        return Decoder(config)


class _SkipInit(TorchFunctionMode):
    """Skip `torch.nn.init`. On the meta device it would only import a compiler, which takes seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def load_decoder(
    path: str | Path | Checkpoint,
    *,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    device: torch.device | str = "cpu",
) -> Decoder:
    """Load the frozen decoder, tensor by tensor, in `dtype` on `device`.

    quantization: hold the linear layers of the blocks in 8 or 4 bits (see `adapter.base.quantization`); the decoder
    then still computes in `dtype`.

    Host memory peaks at the model and its largest tensor (on a GPU, at the largest tensor); quantizing takes a few
    copies of one tensor more. Raises CheckpointError as `open_checkpoint` does, and for a weight that is NaN or
    infinite in the dtype that it is read in; AdapterError if the library that quantizes is missing.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    model, precision = meta_decoder(checkpoint.config), Precision(dtype, quantization)
    for name, source in checkpoint._sources.items():
        # Copy straight from the file to the tensor: temporary tensors in between would fragment the heap.
        value = torch.empty(source.shape, dtype=reading_dtype(model, name, precision), device=device)
        source.copy_to(value)
        source.check_finite(value, name)
        set_weight(model, name, value, precision)
        del value  # what was quantized goes before the next is read
    model.tie()
    return model.eval()


def save_decoder(model: Decoder, folder: str | Path) -> None:
    """Write the base, without any adapter, in Hugging Face's format: `config.json` and `model.safetensors`.

    Each file appears complete or not at all, the configuration last. Raises AdapterError for a quantized base.
    """
    if (precision := precision_of(model)) in get_args(Quantization):
        raise AdapterError(f"the base is held in {precision}, which is no format of files: save one loaded in fp32")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        _hf_key(name): parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if ".adaption." not in name and not name.startswith("vision.")
    }
    with atomic_path(folder / "model.safetensors") as part:
        save_file(tensors, part, metadata={"format": "pt"})
    with atomic_path(folder / "config.json") as part:
        part.write_text(json.dumps(hf_config(model.config, model.norm.weight.dtype), indent=2) + "\n")


def _open_meta(path: Path) -> tuple[DecoderConfig, dict[str, TensorSource]]:
    params = MetaConfig.read(path / "params.json")
    files = sorted(path.glob("consolidated.*.pth"))
    if [file.name for file in files] != [f"consolidated.{i:02d}.pth" for i in range(len(files))] or not files:
        names = ", ".join(file.name for file in files) or "none"
        raise CheckpointError(f"{path}: expected consolidated.00.pth, 01, ... without a gap; found {names}")
    shards = _open_shards(files)
    sources: dict[str, TensorSource] = {}
    for key, first in shards[0].items():
        kind = key.split(".")[-2] if "." in key else ""
        shard_dim = _SHARD_DIM.get(kind)
        if kind == "tok_embeddings":  # by columns in LLaMA 1 and 2, by rows since 3
            shard_dim = 0 if first.shape[-1:] == (params.dim,) else 1
        if shard_dim is None or first.dim() != 2:
            sources[key] = TensorSource((first,), (files[0],))
        else:
            sources[key] = TensorSource(tuple(shard[key] for shard in shards), tuple(files), shard_dim)
    for key in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if key not in sources or not sources[key].shape:
            raise CheckpointError(f"{files[0]}: {key} is missing or a mere number")
    config = params.decoder_config(
        hidden_dim=sources["layers.0.feed_forward.w1.weight"].shape[0],
        vocab_rows=sources["tok_embeddings.weight"].shape[0],
        tied_head="output.weight" not in sources,
    )
    bound = _bind(config, sources, lambda name: name, path if len(files) > 1 else files[0])
    for name, source in bound.items():
        if heads := {"wq": config.n_heads, "wk": config.n_kv_heads}.get(name.split(".")[-2]):
            if heads % len(source.parts):
                raise CheckpointError(f"{path}: {name}: {heads} heads are not whole in {len(source.parts)} shards")
            bound[name] = replace(source, paired_heads=heads)
    return config, bound


def _open_shards(files: list[Path]) -> list[dict[str, Tensor]]:
    """The tensors of every shard, which must have the same keys and ranks."""
    shards = [open_tensors(file) for file in files]
    for file, shard in zip(files, shards, strict=True):
        shard.pop("rope.freqs", None)
        if unshared := sorted(shard.keys() ^ shards[0].keys()):
            raise CheckpointError(f"{file}: {unshared[0]} is not in both this shard and {files[0].name}")
        for key, tensor in shard.items():
            if tensor.dim() != shards[0][key].dim():
                raise CheckpointError(f"{file}: {key} has another rank than in {files[0].name}")
    return shards


def _open_hf(path: Path) -> tuple[DecoderConfig, dict[str, TensorSource]]:
    config = HFConfig.read(path / "config.json").decoder_config()
    files, weight_map = _hf_files(path)
    sources: dict[str, TensorSource] = {}
    for file in files:
        for key, tensor in open_tensors(file).items():
            if key in sources:
                raise CheckpointError(f"{file}: {key} is also in {sources[key].files[0].name}")
            sources[key] = TensorSource((tensor,), (file,))
    if absent := next((key for key in weight_map if key not in sources), None):
        raise CheckpointError(f"{path / weight_map[absent]}: {absent} is missing, though the index lists it")
    for key in [key for key in sources if key.endswith("rotary_emb.inv_freq")]:
        del sources[key]
    if config.tied_head and (head := sources.get("lm_head.weight")):
        if (embedding := sources.get("model.embed_tokens.weight")) and head.equals(embedding):
            del sources["lm_head.weight"]
        else:  # as transformers does: a file's own head counts more than the flag
            config = replace(config, tied_head=False)
    return config, _bind(config, sources, _hf_key, path if len(files) > 1 else files[0])


def _hf_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files with weights and, if there is an index, its map from key to file name."""
    for weights in ("model.safetensors", "pytorch_model.bin"):
        if (index := path / f"{weights}.index.json").is_file():
            weight_map = HFIndex.read(index).weight_map
            if outside := next((name for name in weight_map.values() if Path(name).name != name), None):
                raise CheckpointError(f"{index}: {outside!r} is not the name of a file in this folder")
            return [path / name for name in sorted(set(weight_map.values()))], weight_map
        if (path / weights).is_file():
            return [path / weights], {}
    raise CheckpointError(f"{path}: no weights: expected model.safetensors, pytorch_model.bin, or either's .index.json")


def _bind(
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
        for file, part in zip(source.files, source.parts, strict=True):
            if part.dtype not in _FLOATS:
                raise CheckpointError(f"{file}: {key} is {part.dtype}; quantized weights are not supported")
    return {name: sources[key] for key, name in keys.items()}


def _some(keys: list[str]) -> str:
    return f"{', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"


def _hf_key(name: str) -> str:
    if name in _HF_TOP:
        return _HF_TOP[name]
    _, layer, module = name.removesuffix(".weight").split(".", 2)
    return f"model.layers.{layer}.{_HF_BLOCK[module]}.weight"
