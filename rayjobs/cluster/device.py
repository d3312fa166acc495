"""Choice of the PyTorch device that a model runs on."""

from collections.abc import Mapping


def default_device() -> str:
    """Return the device for a model of this process: "cuda" if PyTorch sees a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def worker_device(resources: Mapping[str, float]) -> str:
    """Return the device for a worker that reserves `resources`: "cuda" if a GPU or a part of one is among them."""
    return "cuda" if resources.get("GPU") else "cpu"
