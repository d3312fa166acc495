"""Choice of the PyTorch device that a model runs on, and the memory that it has taken."""

import re
from collections.abc import Mapping
from pathlib import Path


def default_device() -> str:
    """Return the device for a model of this process: "cuda" if PyTorch sees a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def worker_device(resources: Mapping[str, float]) -> str:
    """Return the device for a worker that reserves `resources`: "cuda" if a GPU or a part of one is among them."""
    return "cuda" if resources.get("GPU") else "cpu"


def peak_memory_bytes(device: str) -> int | None:
    """Return the most memory that this process has held on a device so far; None where the system does not tell.

    device: "cuda" counts PyTorch's tensors on the GPU, "cpu" the resident memory of the process, libraries included.
    """
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) << 10 if found else None
