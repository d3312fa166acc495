"""A model in Meta's format: `params.json` and `consolidated.00.pth`, ..., the model-parallel shards of one model.

wq and wk are made for rotating adjacent pairs; their rows are permuted, so that the decoder can rotate halves.
"""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from adapter.base.binding import bind
from adapter.base.meta_config import MetaConfig
from adapter.base.tensor_files import open_tensors
from adapter.base.tensor_source import TensorSource
from adapter.decoder_config import DecoderConfig
from adapter.errors import CheckpointError

PARAMS = "params.json"
"""Name of the file with the settings of a model in Meta's format."""

_SHARD_DIM = {"wo": 1, "w2": 1, "wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0}  # norms are replicated


def open_meta(path: Path) -> tuple[DecoderConfig, dict[str, TensorSource]]:
    """The configuration of a folder, and a source of each of the decoder's parameters; no value is read.

    Raises CheckpointError, naming file and key, for files that are missing, damaged, or not the shards of one model.
    """
    params = MetaConfig.read(path / PARAMS)
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
    bound = bind(config, sources, lambda name: name, path if len(files) > 1 else files[0])
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
