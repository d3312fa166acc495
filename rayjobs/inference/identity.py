"""Identify by content what generated results depend on: model, records, images."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayjobs.inference.batch import Record
from rayjobs.models.base_model import BaseModelConfig
from rayjobs.models.image_conditioning import ImageConditioning
from rayjobs.storage.fingerprint import content_hashes, hash_file
from rayjobs.storage.paths import cached_path


def model_identity(base: BaseModelConfig, adapter: str | None, sight: ImageConditioning | None) -> dict[str, str]:
    """Who answers, by content and not by path."""
    checkpoint, tokenizer = base.open()
    return {
        "base": f"{checkpoint.fingerprint[:16]} in {base.dtype}",
        "tokenizer": _content(cached_path(tokenizer)),
        "adapter": _content(cached_path(adapter)) if adapter else "none",
        "tower": sight.tower.identity if sight else "none",
    }


def data_identity(records: Sequence[Record], images: str, seen: bool) -> dict[str, str]:
    """What is asked, images included where they are seen."""
    names = dict.fromkeys(record["image"] for record in records if record.get("image")) if seen else {}
    content = content_hashes(images) if names else None
    pixels = digest([content(name) for name in names] if content else [])
    return {"records": digest(records), "images": pixels if seen else "left out"}


def digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _content(path: Path) -> str:
    """Of a file, or of an adapter's folder; of what is not there, nothing."""
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return digest([hash_file(file) for file in files])
