"""Refuse to mix trials of different inputs: classes by name, images by path and content, encoders by their weights."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cafo.dataset_checks import class_changes
from cafo.items import Item
from rayjobs.errors import ProvenanceError
from rayjobs.models.encoder import encoder_of
from rayjobs.storage.files import read_object, write_json
from rayjobs.storage.fingerprint import fingerprint
from rayjobs.tune.images import image_changes, read_images, write_images
from rayjobs.tune.inputs import SweepInputs
from rayjobs.tune.trial import TRIAL_FILE, open_classifier

INPUTS = "inputs.json"


def check_same_classes(folder: Path, class_names: Sequence[str]) -> None:
    """Raise ProvenanceError if the run's folder has trials of other classes; the message names the difference."""
    if before := _recorded(folder):
        _refuse(folder, _class_change(before["classes"], class_names))


def check_same_inputs(folder: Path, inputs: SweepInputs) -> None:
    """Record the classes, images, encoders and sentences of a sweep's trials.

    A folder in which no trial is over yet begins anew. Raises ProvenanceError if it has trials of other inputs; the
    message names each difference.
    """
    now, images = _identity(inputs), inputs.readable_images()
    if before := _recorded(folder):
        changes = [
            *_class_change(before["classes"], now["classes"]),
            *(f"encoders.{name}: {old}" for name, old in _differences(before["encoders"], now["encoders"])),
            *image_changes(read_images(folder), images),
            *(f"the sentences of {name}: {old}" for name, old in _differences(before["sentences"], now["sentences"])),
        ]
        if not changes and before != now:
            changes = [f"the choice {name} is another" for name, _ in _differences(before["choices"], now["choices"])]
        _refuse(folder, changes)
    write_images(folder, images)
    write_json(folder / INPUTS, now)


def check_same_caches(trials: Path, names: Iterable[str], class_names: Sequence[str], identities: Any) -> None:
    """Check that caches and rivals' classifiers are of these classes and encoders.

    Args:
        trials: folder of the trials.
        names: the trials whose caches are checked.
        class_names: the classes of the data set.
        identities: encoder → what identifies its weights and preprocessing.

    Raises:
        ProvenanceError: they are not; the message names the classes or the encoder.
        CafoError: a cache cannot be read.
    """
    for name in sorted(set(names)):
        cache = open_classifier(trials, name)
        if change := class_changes(cache.class_names, class_names):
            raise ProvenanceError(
                f"the sweep's caches are of other classes than the data set has now ({change}); restore the classes, "
                "or sweep under another run.name"
            )
        for encoder, identity in cache.encoders.items():
            if identities[encoder] != identity:
                raise ProvenanceError(
                    f"encoders.{encoder_of(encoder)}: the sweep's caches are of {identity}, the weights are now "
                    f"{identities[encoder]}; put back the weights that it was run with"
                )


def _identity(inputs: SweepInputs) -> dict[str, Any]:
    choices = {f"shots{shots}-seed{seed}": choice.items for (shots, seed), choice in inputs.images.choices.items()}
    generated = {f"generated{count}": items for count, items in inputs.generated.items()}
    return {
        "classes": list(inputs.dataset.class_names),
        "encoders": dict(inputs.identities),
        "sentences": {", ".join(key): inputs.classifiers[key].store for key in sorted(inputs.classifiers)},
        "choices": {name: fingerprint(_by_name(items)) for name, items in {**choices, **generated}.items()},
    }


def _by_name(items: Iterable[Item]) -> list[list[str]]:
    return [[item.path, item.class_name] for item in items]


def _recorded(folder: Path) -> dict[str, Any]:
    """Return the recorded inputs of the trials in a run's folder; empty if no trial is over."""
    path = folder / INPUTS
    if not path.exists() or not any((folder / "trials").glob(f"*/{TRIAL_FILE}")):
        return {}
    recorded = read_object(path)
    if lacking := [key for key in ("classes", "encoders", "sentences", "choices") if key not in recorded]:
        raise ProvenanceError(f"{path} does not record {', '.join(lacking)}: choose another run.name")
    return recorded


def _class_change(before: Sequence[str], now: Sequence[str]) -> list[str]:
    change = class_changes(before, now)
    return [f"classes {change}"] if change else []


def _differences(before: dict[str, str], now: dict[str, str]) -> list[tuple[str, str]]:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [(name, f"was {before.get(name, 'not there')}, now {now.get(name, 'not there')}") for name in names]


def _refuse(folder: Path, changes: Sequence[str]) -> None:
    if changes:
        raise ProvenanceError(
            f"{folder} holds trials of other inputs ({'; '.join(changes)}): restore them, or choose another run.name"
        )
