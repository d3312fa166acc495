"""LLaMA checkpoints, Meta's and Hugging Face's, read into the decoder one tensor at a time; and written back.

Meta's folder: `params.json` and `consolidated.00.pth`, ..., the model-parallel shards of one model. Hugging Face's:
`config.json` and `model.safetensors` or `pytorch_model.bin`, whole or in indexed shards. `open_checkpoint` maps the
files, reads their names and shapes, and proves that they are the model the configuration states before any value is
read. Meta's wq and wk rotate adjacent pairs; their rows are permuted so that the decoder rotates halves.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adapter.atomic_file import atomic_path
from adapter.checkpoint_config import DecoderSettings, hf_settings, read_hf_config, read_meta_config
from adapter.decoder import Llama, LlamaConfig
from adapter.errors import CheckpointError
from adapter.tensor_files import drop_pages, open_tensors

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
class _Source:
    """Where one of the decoder's tensors lies: its mapped parts, the dimension that joins them, and their files."""

    parts: tuple[Tensor, ...]
    files: tuple[Path, ...]
    dim: int = 0
    paired_heads: int = 0
    """Rows are in Meta's order, adjacent pairs in each of this many heads; 0 where no permutation is due."""

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        if len(self.parts) > 1:
            shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

    def read(self) -> Tensor:
        """The whole tensor: the mapped one itself where nothing has to be joined or permuted."""
        if len(self.parts) == 1 and not self.paired_heads:
            return self.parts[0]
        whole = torch.empty(self.shape, dtype=self.parts[0].dtype)
        self.copy_to(whole)
        return whole

    def copy_to(self, whole: Tensor) -> None:
        """Fills `whole`, of any dtype and device, part by part, giving back each part's memory."""
        for part, room in zip(self.parts, whole.split([p.shape[self.dim] for p in self.parts], self.dim), strict=True):
            if self.paired_heads:
                heads, width = self.paired_heads // len(self.parts), part.shape[1]
                room.view(heads, 2, -1, width).copy_(part.view(heads, -1, 2, width).transpose(1, 2))
            else:
                room.copy_(part)
            drop_pages(part)

    def row(self, index: int) -> Tensor:
        """One row of the whole tensor, reading no other."""
        if self.paired_heads:
            half = self.shape[0] // self.paired_heads // 2
            head, offset = divmod(index, 2 * half)
            index = head * 2 * half + 2 * (offset % half) + offset // half
        if self.dim == 1:
            return torch.cat([part[index] for part in self.parts])
        part, index = divmod(index, self.parts[0].shape[0])
        return self.parts[part][index]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose names and shapes are proven to be those of `config`, with no value read yet."""

    path: Path
    config: LlamaConfig
    tokenizer_path: Path | None
    """The SentencePiece model in the folder or, as in Meta's first release, beside it."""
    _sources: dict[str, _Source] = field(repr=False)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) under the decoder's names, on the CPU, in the checkpoint's dtype, one at a time.

        A tensor may be a view of the file: copy it, never write to it. Its memory is given back once the next one is
        asked for. A tied head is not repeated.
        """
        for name, source in self._sources.items():
            tensor = source.read()
            yield name, tensor
            del tensor
            for part in source.parts:
                drop_pages(part)

    @cached_property
    def fingerprint(self) -> str:
        """Names the base by its values: equal in either format, whatever the sharding and the precision they lie in.

        A hash over the shape, all norms, and three rows of every matrix in float32: tens of megabytes at 13B.
        """
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
    """Opens a folder in Meta's or Hugging Face's format.

    Raises CheckpointError, naming file and key, for a folder that is neither, an unsupported architecture, missing or
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
    beside = (path / "tokenizer.model", path.absolute().parent / "tokenizer.model")
    tokenizer = next((file for file in beside if file.is_file()), None)
    return Checkpoint(path, config, tokenizer, sources)


def meta_llama(config: LlamaConfig) -> Llama:
    """The decoder on the meta device: names and shapes, no memory."""
    with torch.device("meta"), _Undrawn():
        return Llama(config)


class _Undrawn(TorchFunctionMode):
    """Random initialisation does nothing. On the meta device it has no effect but to import a compiler: seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def load_llama(
    path: str | Path | Checkpoint, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Llama:
    """The frozen decoder, placed on `device` tensor by tensor: peak host memory is the model and its largest tensor."""
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    model = meta_llama(checkpoint.config)
    for name, source in checkpoint._sources.items():
        # Straight from the file to its place: temporaries between lasting tensors would leave holes in the heap.
        value = torch.empty(source.shape, dtype=dtype, device=device)
        source.copy_to(value)
        module, _, parameter = name.rpartition(".")
        setattr(model.get_submodule(module), parameter, nn.Parameter(value, requires_grad=False))
    model.tie()
    return model.eval()


def save_llama(model: Llama, folder: str | Path) -> None:
    """Writes the base, without any adaption, as a Hugging Face folder: `config.json` and `model.safetensors`.

    Each file appears whole or not at all, the configuration last.
    """
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
        part.write_text(json.dumps(hf_settings(model.config, model.norm.weight.dtype), indent=2) + "\n")


def _open_meta(path: Path) -> tuple[LlamaConfig, dict[str, _Source]]:
    params = DecoderSettings(path / "params.json")
    files = sorted(path.glob("consolidated.*.pth"))
    if [file.name for file in files] != [f"consolidated.{i:02d}.pth" for i in range(len(files))] or not files:
        names = ", ".join(file.name for file in files) or "none"
        raise CheckpointError(f"{path}: expected consolidated.00.pth, 01, ... without a gap; found {names}")
    shards = [open_tensors(file) for file in files]
    for file, shard in zip(files, shards, strict=True):
        shard.pop("rope.freqs", None)
        if odd := sorted(shard.keys() ^ shards[0].keys()):
            raise CheckpointError(f"{file}: {odd[0]} is not in both this shard and {files[0].name}")
        for key, tensor in shard.items():
            if tensor.dim() != shards[0][key].dim():
                raise CheckpointError(f"{file}: {key} has another rank than in {files[0].name}")
    dim = params.whole("dim")
    found: dict[str, _Source] = {}
    for key, first in shards[0].items():
        kind = key.split(".")[-2] if "." in key else ""
        shard_dim = _SHARD_DIM.get(kind)
        if kind == "tok_embeddings":  # by columns in LLaMA 1 and 2, by rows since 3
            shard_dim = 0 if first.shape[-1:] == (dim,) else 1
        if shard_dim is None or first.dim() != 2:
            found[key] = _Source((first,), (files[0],))
        else:
            found[key] = _Source(tuple(shard[key] for shard in shards), tuple(files), shard_dim)
    for key in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if key not in found or not found[key].shape:
            raise CheckpointError(f"{files[0]}: {key} is missing or a mere number")
    config = read_meta_config(
        params,
        hidden_dim=found["layers.0.feed_forward.w1.weight"].shape[0],
        vocab_rows=found["tok_embeddings.weight"].shape[0],
        tied_head="output.weight" not in found,
    )
    sources = _bind(config, found, lambda name: name, path if len(files) > 1 else files[0])
    for name, source in sources.items():
        if heads := {"wq": config.n_heads, "wk": config.n_kv_heads}.get(name.split(".")[-2]):
            if heads % len(source.parts):
                raise CheckpointError(f"{path}: {name}: {heads} heads are not whole in {len(source.parts)} shards")
            sources[name] = replace(source, paired_heads=heads)
    return config, sources


def _open_hf(path: Path) -> tuple[LlamaConfig, dict[str, _Source]]:
    config = read_hf_config(DecoderSettings(path / "config.json"))
    found: dict[str, _Source] = {}
    promised: dict[str, str] = {}
    for weights in ("model.safetensors", "pytorch_model.bin"):
        if (index := path / f"{weights}.index.json").is_file():
            promised = DecoderSettings(index).get("weight_map")
            if not isinstance(promised, dict) or not all(isinstance(name, str) for name in promised.values()):
                raise CheckpointError(f"{index}: weight_map is missing or does not map keys to file names")
            if outside := next((name for name in promised.values() if Path(name).name != name), None):
                raise CheckpointError(f"{index}: {outside!r} is not the name of a file in this folder")
            files = [path / name for name in sorted(set(promised.values()))]
            break
        if (path / weights).is_file():
            files = [path / weights]
            break
    else:
        raise CheckpointError(
            f"{path}: no weights: expected model.safetensors, pytorch_model.bin, or either's .index.json"
        )
    for file in files:
        for key, tensor in open_tensors(file).items():
            if key in found:
                raise CheckpointError(f"{file}: {key} is also in {found[key].files[0].name}")
            found[key] = _Source((tensor,), (file,))
    if absent := next((key for key in promised if key not in found), None):
        raise CheckpointError(f"{path / promised[absent]}: {absent} is missing, though the index promises it")
    ignored = [key for key in found if key.endswith("rotary_emb.inv_freq")]
    ignored += ["lm_head.weight"] * (config.tied_head and "lm_head.weight" in found)
    for key in ignored:
        del found[key]
    return config, _bind(config, found, _hf_key, path if len(files) > 1 else files[0])


def _bind(
    config: LlamaConfig, found: dict[str, _Source], key_of: Callable[[str], str], where: Path
) -> dict[str, _Source]:
    """The decoder's parameters, each with its source; raises unless the two sets match exactly, in name and shape."""
    if config.n_layers > len(found):  # before so many are built
        raise CheckpointError(f"{where}: {len(found)} tensors cannot be a model of {config.n_layers} layers")
    expected = {name: tuple(parameter.shape) for name, parameter in meta_llama(config).named_parameters()}
    keys = {key_of(name): name for name in expected}
    missing, unexpected = [key for key in keys if key not in found], [key for key in found if key not in keys]
    if missing or unexpected:
        faults = [f"{_some(missing)} missing"] * bool(missing) + [f"{_some(unexpected)} unexpected"] * bool(unexpected)
        raise CheckpointError(f"{where}: {'; '.join(faults)} for a model of {config.n_layers} layers")
    for key, name in keys.items():
        source = found[key]
        if source.shape != expected[name]:
            hint = f" (joined from {len(source.parts)} shards; is one missing?)" if len(source.parts) > 1 else ""
            raise CheckpointError(
                f"{source.files[0]}: {key} has shape {source.shape}, the configuration wants {expected[name]}{hint}"
            )
        for file, part in zip(source.files, source.parts, strict=True):
            if part.dtype not in _FLOATS:
                raise CheckpointError(f"{file}: {key} is {part.dtype}; quantized weights are not supported")
    return {name: found[key] for key, name in keys.items()}


def _some(keys: list[str]) -> str:
    return f"{', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"


def _hf_key(name: str) -> str:
    if name in _HF_TOP:
        return _HF_TOP[name]
    _, layer, module = name.removesuffix(".weight").split(".", 2)
    return f"model.layers.{layer}.{_HF_BLOCK[module]}.weight"
