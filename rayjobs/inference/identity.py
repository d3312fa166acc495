"""Identify by content what generated results depend on: model, records, images."""

from collections.abc import Sequence
from pathlib import Path

from rayjobs.inference.batch import Record
from rayjobs.models.base_model import BaseModelConfig
from rayjobs.models.image_conditioning import ImageConditioning
from rayjobs.storage.fingerprint import file_fingerprint, file_fingerprints, fingerprint
from rayjobs.storage.download import cached_path


def model_identity(base: BaseModelConfig, adapter: str | None, conditioning: ImageConditioning | None) -> dict[str, str]:
    """Who answers, by content and not by path."""
    checkpoint, tokenizer = base.open()
    return {
        "base": f"{checkpoint.fingerprint[:16]} in {base.dtype}",
        "tokenizer": _content(cached_path(tokenizer)),
        "adapter": _content(cached_path(adapter)) if adapter else "none",
        "encoder": conditioning.encoder.identity if conditioning else "none",
    }


def data_identity(records: Sequence[Record], images: str, seen: bool) -> dict[str, str]:
    """What is asked, images included where they are seen."""
    names = dict.fromkeys(record["image"] for record in records if record.get("image")) if seen else {}
    pixels = list(file_fingerprints(images, names).values()) if names else []
    return {
        "records": fingerprint(records)[:16],
        "images": fingerprint(pixels)[:16] if seen else "left out",
    }


def _content(path: Path) -> str:
    """Of a file, or of an adapter's folder; of what is not there, nothing."""
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return fingerprint([file_fingerprint(file) for file in files])[:16]
