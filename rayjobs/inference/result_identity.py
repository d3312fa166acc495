"""Identify by content what generated results depend on: the model, the records and their images."""

from collections.abc import Sequence

from rayjobs.inference.adapter_source import AdapterSourceConfig
from rayjobs.inference.batch import Record
from rayjobs.models.base_model import open_tokenizer
from rayjobs.models.image_conditioning import ImageConditioning
from rayjobs.storage.download import cached_path
from rayjobs.storage.fingerprint import content_fingerprint, file_fingerprints, fingerprint


def model_identity(model: AdapterSourceConfig, conditioning: ImageConditioning | None) -> dict[str, str]:
    """The base, tokenizer, adapter and image encoder, by content and not by path."""
    checkpoint, tokenizer = model.base.open()
    return {
        "base": f"{checkpoint.fingerprint()[:16]} in {model.base.dtype}",
        "tokenizer": open_tokenizer(tokenizer).fingerprint[:16],
        "adapter": content_fingerprint(cached_path(model.adapter)) if model.adapter else "none",
        "encoder": conditioning.encoder.identity if conditioning else "none",
    }


def data_identity(records: Sequence[Record], image_root: str, reads_images: bool) -> dict[str, str]:
    """The records and, if the model reads images, the content of their images."""
    names = dict.fromkeys(record["image"] for record in records if record.get("image")) if reads_images else {}
    pixels = list(file_fingerprints(image_root, names).values()) if names else []
    return {
        "records": fingerprint(records)[:16],
        "images": fingerprint(pixels)[:16] if reads_images else "left out",
    }
