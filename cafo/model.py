"""CaFo as one object: fit it on a data set, predict images, keep it in a file.

    from cafo import CaFo, EncoderSpec

    encoders = {
        "clip": EncoderSpec(kind="clip", name="RN50", weights="openai"),
        "dino": EncoderSpec(kind="dino", weights="dino_resnet50_pretrain.pth"),
    }
    model = CaFo.fit("photos", encoders, shots=16)    # a folder per class
    model.predict(["a.jpg", "b.jpg"])                 # [Prediction("cat", 0.97), Prediction("dog", 0.88)]
    model.save("pets.safetensors")
    CaFo.load("pets.safetensors", encoders)           # a sweep's cache.safetensors loads the same way

In one process and in memory; the jobs of `rayjobs` do the same over a cluster, with stores and sweeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cafo import fewshot
from cafo.cache import Cache, KeyTraining, load_cache, mean_key, save_cache, train_keys
from cafo.datasets import Dataset, Item, load_tree
from cafo.encoder_spec import EncoderSpec
from cafo.encoders import ClipEncoder, ImageEncoder, load_encoder
from cafo.errors import CafoError
from cafo.images import load_image
from cafo.prompt import read_prompts, template_prompts, zero_shot_classifier
from cafo.search import BetaGrid, search

_IMAGES_AT_ONCE = 64


class Prediction(NamedTuple):
    """The likeliest class of an image."""

    class_name: str
    probability: float
    """its softmax over the logits"""


class CaFo:
    """A fitted classifier: a cache and the towers that made its keys."""

    def __init__(self, cache: Cache, encoders: Mapping[str, ImageEncoder]) -> None:
        self.cache, self.encoders = cache, encoders

    @classmethod
    def fit(
        cls,
        data: Dataset | str | Path,
        encoders: Mapping[str, EncoderSpec],
        *,
        shots: int = 16,
        seed: int = 1,
        views: int = 10,
        prompts: Mapping[str, Sequence[str]] | str | Path | None = None,
        generated: tuple[Path, Sequence[Item]] | None = None,
        training: KeyTraining | None = None,
        grid: BetaGrid | None = None,
        device: str | torch.device = "cpu",
    ) -> CaFo:
        """Choose K shots, encode their views, train the keys, and search α and β on the validation images.

        Args:
            data: a data set, or a folder with one folder per class, of which half is for training and a fifth for
                validation; its test images stay unread.
            encoders: the towers by name; the first is the CLIP that gives p_ZS.
            shots: K, training images of each class; a class that has fewer gives all it has.
            seed: of the choice of images, of their augmented views, and of the order of training.
            views: augmented views that a key averages over.
            prompts: {class name: sentences}, or a JSON file of them; without it, the data set's templates.
            generated: (folder, images) that join the cache, as `load_generated` returns them.

        Raises:
            ValueError: a folder without classes, no validation image, an image that cannot be read, a tower that
                cannot be loaded, a class without a sentence.
        """
        dataset = data if isinstance(data, Dataset) else load_tree(data, seed=seed)
        if not dataset.val:
            raise CafoError(f"{dataset.name} has no validation image, and α and β are chosen on those; give it some")
        towers = _load(encoders, device)
        zero_shot_source = next(iter(towers))
        clip = towers[zero_shot_source]
        if not isinstance(clip, ClipEncoder):
            raise CafoError(f"the first encoder reads the sentences, so it must be a CLIP; {zero_shot_source} is not")
        if prompts is None:
            sentences: Mapping[str, Sequence[str]] = template_prompts(dataset.templates, dataset.class_names)
        else:
            sentences = prompts if isinstance(prompts, Mapping) else read_prompts(prompts, dataset.class_names)
        choice = fewshot.choose(dataset.train, dataset.class_names, shots=shots, seed=seed, short="report")
        items = [(dataset.image_root, item) for item in choice.items]
        items += [(generated[0], item) for item in generated[1]] if generated else []
        seen = _encode_views(towers, items, views, seed)
        labels = torch.tensor([item.label for _, item in items])
        val = _encode(towers, [dataset.image_root / item.path for item in dataset.val], "validation images")
        val_labels = torch.tensor([item.label for item in dataset.val])
        start = Cache(
            keys={name: mean_key(features) for name, features in seen.items()},
            labels=labels,
            classifier=zero_shot_classifier(clip, sentences, dataset.class_names).weights.cpu(),
            class_names=dataset.class_names,
            zero_shot_source=zero_shot_source,
            encoders={name: tower.identity for name, tower in towers.items()},
        )
        recipe = training or KeyTraining(seed=seed)
        trained, _ = train_keys(start, seen, labels, val, val_labels, recipe)
        found = search(trained.zero_shot(val), trained.affinities(val), labels, val_labels, grid=grid or BetaGrid())
        chosen = replace(trained, alpha=found.alpha, beta=found.beta, ensemble=found.ensemble)
        return cls(chosen, towers)

    @classmethod
    def load(cls, path: str | Path, encoders: Mapping[str, EncoderSpec], *, device: str | torch.device = "cpu") -> CaFo:
        """A saved cache with the towers that it was made with.

        Raises:
            ValueError: no such file, a source without a tower, or a tower other than the one that made the keys.
        """
        cache = load_cache(path)
        if missing := {*cache.keys, cache.zero_shot_source} - set(encoders):
            raise CafoError(f"{path} needs encoders called {', '.join(sorted(missing))}, which were not given")
        towers = _load({name: spec for name, spec in encoders.items() if name in cache.encoders}, device)
        for name, tower in towers.items():
            if tower.identity != cache.encoders[name]:
                raise CafoError(f"{path}: keys of {name} were made by {cache.encoders[name]}, not by {tower.identity}")
        return cls(cache, towers)

    def save(self, path: str | Path) -> None:
        """Write the cache, without the towers."""
        save_cache(self.cache, path)

    def logits(self, images: Sequence[str | Path | Image.Image]) -> Tensor:
        """Eq. 9: (B, N) for B images, files or PIL's."""
        return self.cache.logits(_encode(self.encoders, images))

    def predict(self, images: Sequence[str | Path | Image.Image]) -> list[Prediction]:
        """The likeliest class of each image.

        Raises:
            ValueError: an image that cannot be read, by its name.
        """
        best, labels = self.logits(images).softmax(dim=-1).max(dim=-1)
        names = [self.cache.class_names[label] for label in labels.tolist()]
        return [Prediction(name, share) for name, share in zip(names, best.tolist(), strict=True)]


def _load(specs: Mapping[str, EncoderSpec], device: str | torch.device) -> dict[str, ImageEncoder]:
    return {name: load_encoder(spec, device) for name, spec in specs.items()}


def _encode(
    towers: Mapping[str, ImageEncoder], images: Sequence[str | Path | Image.Image], told: str = "images"
) -> dict[str, Tensor]:
    """{name: (B, C)}; each image is decoded once."""
    decoded = (image if isinstance(image, Image.Image) else load_image(image) for image in images)
    prepared = ({name: tower.preprocess(image) for name, tower in towers.items()} for image in decoded)
    return _through(towers, prepared, len(images), told)


def _encode_views(
    towers: Mapping[str, ImageEncoder], items: Sequence[tuple[Path, Item]], views: int, seed: int
) -> dict[str, Tensor]:
    """{name: (V, M, C)}; each image is decoded once."""
    if not items:
        return {name: torch.empty(views, 0, tower.width) for name, tower in towers.items()}
    decoded = ((load_image(root / item.path), item.path) for root, item in items)
    prepared = (
        {name: tower.preprocess.view(image, path, view, seed) for name, tower in towers.items()}
        for image, path in decoded
        for view in range(views)
    )
    flat = _through(towers, prepared, len(items) * views, "views of training images")
    return {name: rows.view(len(items), views, -1).transpose(0, 1).contiguous() for name, rows in flat.items()}


def _through(
    towers: Mapping[str, ImageEncoder], prepared: Iterable[dict[str, Tensor]], count: int, told: str
) -> dict[str, Tensor]:
    """Prepared images through all towers in batches, with a progress bar where it takes a while: {name: (B, C)}."""
    done: dict[str, list[Tensor]] = {name: [] for name in towers}
    waiting: list[dict[str, Tensor]] = []
    for number, one in enumerate(tqdm(prepared, told, count, disable=count <= _IMAGES_AT_ONCE), start=1):
        waiting.append(one)
        if len(waiting) == _IMAGES_AT_ONCE or number == count:
            for name, tower in towers.items():
                done[name].append(tower.encode_image(torch.stack([image[name] for image in waiting])).cpu())
            waiting = []
    return {name: torch.cat(parts) if parts else torch.empty(0, towers[name].width) for name, parts in done.items()}
