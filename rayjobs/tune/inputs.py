"""The arrays that all trials of a sweep share."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from cafo.fewshot import FewShot
from rayjobs.data.feature_store import Features
from rayjobs.data.image_list import ImageList
from rayjobs.data.text_classifier import ClassifierFile
from rayjobs.errors import UserError
from rayjobs.storage.files import read_json, write_json


def check_same_inputs(
    folder: Path,
    lists: list[ImageList],
    features: Mapping[str, Features],
    choices: Mapping[tuple[int, int], FewShot],
    classifiers: Mapping[tuple[str, str], ClassifierFile],
) -> None:
    """Trials of one sweep saw the same images, weights and sentences. Raises ValueError if others lie there now."""
    labels = [[list(item) for item in images.items] for images in lists]
    few_shot = [[list(item) for item in choice.items] for choice in choices.values()]
    now = {
        "lists of images": hashlib.sha256(json.dumps([labels, few_shot]).encode()).hexdigest(),
        "images or encoders": {role: dict(found.stores) for role, found in features.items()},
        "sentences or text encoders": {", ".join(key): classifiers[key].store for key in sorted(classifiers)},
    }
    path = folder / "inputs.json"
    if path.exists() and (before := read_json(path)) != now:
        changed = [name for name in now if before.get(name) != now[name]]
        raise UserError(
            f"{folder} holds trials of other {' and other '.join(changed)} than there are now: choose another run.name"
        )
    write_json(path, now)
