"""Read the safetensors files that a user may have copied, cut short or replaced, with errors that name the remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cafo.errors import CafoError
from cafo.files import is_lfs_pointer

_T = TypeVar("_T")


def read_tensor_file(
    path: str | Path,
    format: str,
    build: Callable[[Mapping[str, str], dict[str, Tensor]], _T],
    *,
    content: str,
    make: str,
) -> _T:
    """Read a safetensors file of a format, and build what it holds.

    Args:
        path: the file.
        format: its format, which its header has to name.
        build: makes the content from the header and the tensors.
        content: what the file holds, for error messages, such as "cache".
        make: how it is made, for error messages, such as "train".

    Raises:
        CafoError: the file is missing, cut short, a Git LFS pointer, or not of this format, its header lacks what
            `build` reads, or its tensors hold NaN or infinity.
    """
    if not Path(path).is_file():
        raise CafoError(f"no {content} at {path}; {make} one first")
    if is_lfs_pointer(path):
        raise CafoError(f"{path} is a Git LFS pointer, not the {content} itself; run `git lfs pull`")
    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != format:
                raise CafoError(f"{path} is not a {format} file (its header says {header.get('format')!r})")
            # Copied, since the last bits of a product may depend on the memory alignment of its factors.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
        if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise CafoError(f"{path}: {', '.join(broken)} hold NaN or infinity; delete the file and {make} it again")
        return build(header, tensors)
    except (SafetensorError, LookupError, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, CafoError):
            raise
        size = Path(path).stat().st_size
        raise CafoError(
            f"{path} is no whole {format} file ({_describe(error)}; {size:,} bytes); copy it again, or delete it and "
            f"{make} it again"
        ) from error


def _describe(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return repr(error)
