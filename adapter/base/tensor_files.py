"""Read tensors from files by memory mapping, without running code.

A mapped tensor takes no memory until it is read. From then on its pages count as the process's own memory, until
`drop_pages` returns them: so a loop over a checkpoint keeps one tensor in memory, not all of them.
"""

import ctypes
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapter.errors import CheckpointError
from adapter.file_kind import check_content, describe_content

_PAGE = 4096
_MADV_DONTNEED = 4


def open_tensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a safetensors file or of PyTorch's own format, by name. Never write to them.

    The format is recognised by the content. A PyTorch file may hold its tensors under the key `model`. It is read by
    PyTorch's weights-only unpickler, which builds tensors and plain containers but runs no code. A file written before
    PyTorch 1.6 cannot be mapped and is read into memory.

    Raises CheckpointError for a file that is missing, truncated, corrupt or unsafe, or that holds anything but named
    tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    check_content(path, CheckpointError)
    if is_safetensors(path):
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file, truncated or corrupt ({error})") from error
    if kind := describe_content(path):
        raise CheckpointError(f"{path}: {kind}, not tensors; name a file in safetensors' or PyTorch's format")
    return _named_tensors(path, _load_pickle(path))


def is_safetensors(path: Path) -> bool:
    """True for a file in safetensors' format, or named so: a header's length in 8 bytes, then a JSON object."""
    with path.open("rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or (head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in a safetensors file's header. Raises CheckpointError if the file cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file, truncated or corrupt ({error})") from error


def drop_pages(tensor: Tensor) -> None:
    """Return a mapped tensor's resident pages to the system. Reading the tensor again reads them from the file.

    Without this, loading a checkpoint of 200 MB peaked at 1.9 times (Hugging Face) and 1.4 times (Meta) the memory of
    the model and its largest tensor, instead of 1.0 times.

    Does nothing for a tensor outside a mapped file, and on systems without /proc/self/maps.
    """
    storage = tensor.untyped_storage()
    start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    if start == end or not _in_mapped_file(start, end):
        return
    start -= start % _PAGE
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.madvise(start, end - start, _MADV_DONTNEED)


def trim_heap() -> None:
    """Return the gaps that freed tensors left in the heap to the system. Does nothing without glibc.

    Without this, SmolLM2-135M in int8 took 419 MB for 163 MB of weights after it was loaded, now 173 MB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _in_mapped_file(start: int, end: int) -> bool:
    """True if memory [start, end) is a mapped file. Pages of any other memory would be lost, not read again."""
    try:
        with open("/proc/self/maps") as maps:
            for line in maps:
                bounds, _, _, _, inode, *_ = line.split(maxsplit=5)
                low, high = (int(bound, 16) for bound in bounds.split("-"))
                if low <= start and end <= high:
                    return inode != "0"
    except OSError:
        pass
    return False


def _load_pickle(path: Path) -> object:
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        return torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        fault = f"holds {named[1]}" if named else "is damaged or holds more than tensors"
        raise CheckpointError(
            f"{path}: refused, because its pickle {fault}, and a pickle can run code. If you trust the file, save its "
            "tensors alone, as safetensors."
        ) from error
    except Exception as error:  # the unpickler does not check damaged content, so that any error may come of it
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: not a readable PyTorch file, truncated or corrupt ({reason})") from error


def _named_tensors(path: Path, content: object) -> dict[str, Tensor]:
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not tensors by name")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {key!r} is a {type(value).__name__}, not a tensor; save the tensors alone")
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise CheckpointError(f"{path}: {key} is not a plain dense tensor")
    return content
