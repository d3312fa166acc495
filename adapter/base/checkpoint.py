"""Read a checkpoint in Meta's, Hugging Face's or llama.cpp's format into the decoder, one tensor at a time.

`open_checkpoint` maps the files, reads names and shapes, and checks that they are the model that the configuration
states, before any value is read.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapter.atomic_file import atomic_path
from adapter.base.binding import meta_decoder
from adapter.base.gguf_checkpoint import open_gguf
from adapter.base.hf_checkpoint import CONFIG, open_hf
from adapter.base.hf_config import hf_config, read_hf_config
from adapter.base.meta_checkpoint import PARAMS, open_meta
from adapter.base.quantization import Precision, Quantization, precision_of, reading_dtype, set_weight
from adapter.base.tensor_names import hf_key
from adapter.base.tensor_source import TensorSource
from adapter.decoder import Decoder
from adapter.decoder_config import DecoderConfig
from adapter.errors import AdapterError, CheckpointError
from adapter.gguf_file import find_gguf, is_gguf
from adapter.tokenizers.load import find_tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose names and shapes were checked against `config`, but whose values were not read yet."""

    path: Path
    config: DecoderConfig
    tokenizer_path: Path | None
    """Path for `load_tokenizer`: the folder or, in Meta's layout alone, a file beside it; None if it has none."""
    _sources: dict[str, TensorSource] = field(repr=False)

    def tensors(
        self, dtype_of: Callable[[str], torch.dtype], device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, Tensor]]:
        """Read the tensors one at a time: (name, new tensor on `device`), under the decoder's names.

        dtype_of: the dtype to read the tensor of a name in. A tied head is not repeated. Raises CheckpointError, naming
        file and tensor, for a value that is NaN or infinite in that dtype.
        """
        for name, source in self._sources.items():
            # Copy straight from the file to the tensor: temporary tensors in between would fragment the heap.
            value = torch.empty(source.shape, dtype=dtype_of(name), device=device)
            source.copy_to(value)
            source.check_finite(value, name)
            yield name, value
            del value  # if the caller dropped it too, it goes before the next is read

    @property
    def has_weights(self) -> bool:
        """False if only the configuration was there to read (see `open_config`)."""
        return bool(self._sources)

    def fingerprint(self) -> str:
        """Identify the base by its values, independent of the files' format, sharding and precision.

        A SHA-256, in hexadecimal, over the shape and switches, all norms and biases, and three rows of every matrix in
        float32. The first call reads tens of megabytes at 13B; later calls read nothing.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        config = self.config
        digest = hashlib.sha256(repr(tuple(config.sizes().values())).encode())
        if switches := config.switches():
            digest.update(json.dumps(switches, sort_keys=True).encode())
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
    """Open a folder in Meta's or Hugging Face's format, or a GGUF file, alone or in a folder; no value is read yet.

    Raises CheckpointError, naming file and key, for a path in no format, an unsupported architecture, missing or
    unexpected keys, wrong shapes, truncated files, and pickles that hold more than tensors.
    """
    path = Path(path)
    if is_gguf(path):
        config, sources = open_gguf(path)
        return Checkpoint(path, config, path, sources)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: neither a GGUF file nor a folder; give the folder that holds params.json or config.json"
        )
    if (path / CONFIG).is_file():
        config, sources = open_hf(path)
    elif (path / PARAMS).is_file():
        config, sources = open_meta(path)
    elif len(files := find_gguf(path)) == 1:
        config, sources = open_gguf(files[0])
    elif files:
        names = ", ".join(file.name for file in files[:3])
        raise CheckpointError(f"{path}: holds {len(files)} models: give one of the files {names}")
    else:
        raise CheckpointError(
            f"{path}: neither config.json (Hugging Face) nor params.json (Meta) nor a GGUF file is in this folder"
        )
    return Checkpoint(path, config, _find_tokenizer(path), sources)


def has_weight_files(folder: Path) -> bool:
    """True if a file of a folder may hold weights, by its ending."""
    return any(file.suffix in (".safetensors", ".bin", ".pth", ".pt", ".gguf") for file in folder.iterdir())


def open_config(path: str | Path) -> Checkpoint:
    """Open a folder in Hugging Face's format whose weights are not there yet: its shape and its tokenizer are known.

    Raises CheckpointError, naming file and key, if the decoder does not compute such a model.
    """
    path = Path(path)
    config = path / CONFIG
    if not config.is_file():
        raise CheckpointError(f"{path}: without config.json (Hugging Face), the weights are needed to know the model")
    return Checkpoint(path, read_hf_config(config).decoder_config(), _find_tokenizer(path), {})


def _find_tokenizer(path: Path) -> Path | None:
    """The checkpoint's folder if it has a tokenizer, or the file beside it that belongs to it.

    One beside the folder is used for Meta's layout alone, whose first release has one tokenizer beside `7B/`, `13B/`,
    ..., and only for a folder without a tokenizer of its own. Elsewhere it is a neighbour's.
    """
    if find_tokenizer(path):
        return path
    beside = path.absolute().parent / "tokenizer.model"
    return beside if beside.is_file() and not (path / CONFIG).is_file() else None


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
    for name, value in checkpoint.tensors(partial(reading_dtype, model, precision=precision), device):
        set_weight(model, name, value, precision)
        del value
    model.tie()
    return model.eval()


def save_decoder(model: Decoder, folder: str | Path) -> None:
    """Write the base, without an adapter's parts, in Hugging Face's format: `config.json` and `model.safetensors`.

    Each file appears complete or not at all, the configuration last. Raises AdapterError for a quantized base.
    """
    if (precision := precision_of(model)) in get_args(Quantization):
        raise AdapterError(f"the base is held in {precision}, which is no format of files: save one loaded in fp32")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        hf_key(name, post_norms=model.config.post_norms): parameter.detach().contiguous()
        for name, parameter in model.base_parameters()
    }
    with atomic_path(folder / "model.safetensors") as part:
        save_file(tensors, part, metadata={"format": "pt"})
    with atomic_path(folder / CONFIG) as part:
        part.write_text(json.dumps(hf_config(model.config, model.norm.weight.dtype), indent=2) + "\n")
