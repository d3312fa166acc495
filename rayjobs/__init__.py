"""Everything that touches Ray or DeepSpeed: the jobs, and the streams, engines and sweeps they run on."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`__version__`, the version of the installed package; "not installed" for a folder that Python runs it from."""
    if name != "__version__":
        raise AttributeError(f"module 'rayjobs' has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rayjobs")
    except PackageNotFoundError:  # a folder that was uploaded to a cluster is not installed there
        return "not installed"
