"""A model in Hugging Face's format: `config.json`, and `model.safetensors` or `pytorch_model.bin`, or their shards."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from adapter.base.binding import bind
from adapter.base.hf_config import read_hf_config
from adapter.base.json_config import JsonConfig
from adapter.base.tensor_files import open_tensors
from adapter.base.tensor_names import hf_key
from adapter.base.tensor_source import TensorSource
from adapter.decoder_config import DecoderConfig
from adapter.errors import CheckpointError

CONFIG = "config.json"
"""Name of the file with the settings of a model in Hugging Face's format."""


def open_hf(path: Path) -> tuple[DecoderConfig, dict[str, TensorSource]]:
    """The configuration of a folder, and a source of each of the decoder's parameters; no value is read.

    Raises CheckpointError, naming file and key, for files that are missing or damaged, and for an index that they
    contradict.
    """
    config = read_hf_config(path / CONFIG).decoder_config()
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
    key_of = partial(hf_key, post_norms=config.post_norms)
    return config, bind(config, sources, key_of, path if len(files) > 1 else files[0])


class _HFIndex(JsonConfig):
    """Hugging Face's index of a checkpoint in several files."""

    weight_map: dict[str, str]
    """Key of each tensor → name of its file."""


def _hf_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files with weights and, if there is an index, its map from key to file name."""
    for weights in ("model.safetensors", "pytorch_model.bin"):
        if (index := path / f"{weights}.index.json").is_file():
            weight_map = _HFIndex.read(index).weight_map
            if outside := next((name for name in weight_map.values() if Path(name).name != name), None):
                raise CheckpointError(f"{index}: {outside!r} is not the name of a file in this folder")
            return [path / name for name in sorted(set(weight_map.values()))], weight_map
        if (path / weights).is_file():
            return [path / weights], {}
    raise CheckpointError(f"{path}: no weights: expected model.safetensors, pytorch_model.bin, or either's .index.json")
