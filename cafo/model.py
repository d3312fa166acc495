"""CaFo as one object: fit it on a data set, predict images, save it to a file.

    from cafo import CaFo, EncoderSpec

    encoders = {
        "clip": EncoderSpec(kind="clip", name="RN50", weights="openai"),
        "dino": EncoderSpec(kind="dino", weights="dino_resnet50_pretrain.pth"),
    }
    model = CaFo.fit("photos", encoders, shots=16)    # a folder per class
    cat, dog = model.predict(["a.jpg", "b.jpg"], top=3)
    cat.class_name, cat.probability, cat.top          # "cat", 0.97, (("cat", 0.97), ("lynx", 0.02), ("dog", 0.01))
    model.save("pets.safetensors")
    CaFo.load("pets.safetensors", encoders)           # a sweep's cache.safetensors loads the same way

It runs in one process and in memory, and logs its progress at level INFO. The jobs of `rayjobs` do the same on a
cluster, with feature stores and sweeps.

Legend: B images, C width of an encoder's features, K shots, M keys, N classes, S side of an encoder's images in pixels,
V views.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cafo import fewshot
from cafo.cache import Cache, load_cache, mean_key, save_cache
from cafo.choice_names import Select
from cafo.cross_fit import TrainingImages
from cafo.datasets import Dataset
from cafo.encoder_spec import EncoderSpec
from cafo.encoders import ClipEncoder, ImageEncoder, load_encoder
from cafo.ensemble import Ensemble
from cafo.errors import CafoError, DatasetError, EncoderError
from cafo.estimate import Estimate
from cafo.fewshot import FewShot
from cafo.image_trees import load_tree
from cafo.images import ImageInput, load_image
from cafo.items import Item
from cafo.key_training import KeyTraining
from cafo.onnx_export import export_onnx
from cafo.prediction import Prediction, predict
from cafo.prompt import read_prompts, template_prompts, zero_shot_classifier
from cafo.search import weight_grid
from cafo.search_grid import BetaGrid
from cafo.selection import Choosing, Selected, default_select, select

_IMAGES_PER_BATCH = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """The inputs and settings of `CaFo.fit` that rarely change."""

    views: int = 10
    """V, augmented views that a key averages over"""
    prompts: Mapping[str, Sequence[str]] | str | Path | None = None
    """{class name: sentences}, or a JSON file of them; None for the data set's templates"""
    generated: tuple[Path, Sequence[Item]] | None = None
    """folder and images that join the cache, as `load_generated` returns them"""
    training: KeyTraining | None = None
    """recipe of the keys' training; None for the paper's recipe with the seed of the fit"""
    grid: BetaGrid = field(default_factory=BetaGrid)
    """values of β that are searched"""
    select: Select | None = None
    """what α, β, the epoch and the ensemble are chosen on (`cafo.selection`); None for validation images where the data
    set has some, and otherwise for training images that are held out"""


class CaFo:
    """A fitted classifier: a cache, and the encoders that made its keys.

    `estimate` is an estimate of its accuracy, where `fit` made one; it is not saved.
    """

    def __init__(self, cache: Cache, encoders: Mapping[str, ImageEncoder], estimate: Estimate | None = None) -> None:
        self.cache, self.encoders, self.estimate = cache, encoders, estimate

    @classmethod
    def fit(
        cls,
        data: Dataset | str | Path,
        encoders: Mapping[str, EncoderSpec],
        *,
        shots: int | None = 16,
        seed: int = 1,
        config: FitConfig | None = None,
        device: str | torch.device = "cpu",
    ) -> CaFo:
        """Choose K shots, encode their views, train the keys, and choose α, β and the sources that help.

        The choice is made on validation images. Without any it is made on training images that are held out
        (`cafo.selection`), and `estimate` of the classifier is an estimate of its accuracy with a 95% interval.

        Args:
            data: a data set, or a folder as `load_tree` reads it: with one folder per class, or with folders `train`,
                `val` and `test` of such folders. The test images are never read.
            encoders: the encoders by name; the first is the CLIP that gives p_ZS.
            shots: K, training images of each class; a class that has fewer gives all it has. None for all images.
            seed: seed of the split of a folder, of the few-shot choice, of the augmented views and of the training.
            config: prompts, generated images and everything else.
            device: where the images are encoded; the keys are trained on the CPU.

        Raises:
            DatasetError: a folder without classes, or fewer than two classes.
            EncoderError: an encoder that cannot be loaded, or a first encoder that is not a CLIP.
            ImageError: an image that cannot be read.
            CafoError: a class without a sentence, a prompt file that cannot be read, or a choice on images that are not
                there.
        """
        config = config or FitConfig()
        dataset = _open_dataset(data, seed)
        loaded = _load_encoders(encoders, device)
        clip_name, clip = next(iter(loaded.items()))
        if not isinstance(clip, ClipEncoder):
            raise EncoderError(f"the first encoder encodes the sentences, so it must be a CLIP; {clip_name} is not")
        sentences = _read_sentences(dataset, config.prompts)

        choice = _choose_shots(dataset, shots, seed)
        folder, generated = config.generated or (dataset.image_root, ())
        images = [*((dataset.image_root, item) for item in choice.items), *((folder, item) for item in generated)]
        views = _encode_views(loaded, images, config.views, seed)
        untrained = Cache(
            keys={name: mean_key(features) for name, features in views.items()},
            labels=torch.tensor([item.label for _, item in images]),
            classifier=zero_shot_classifier(clip, sentences, dataset.class_names).weights.cpu(),
            class_names=dataset.class_names,
            zero_shot_source=clip_name,
            encoders={name: encoder.identity for name, encoder in loaded.items()},
            key_names=tuple(item.path for _, item in images),
        )
        training = config.training or KeyTraining(seed=seed)
        most = max(Counter(item.label for item in choice.items).values(), default=0)
        how = config.select or default_select(has_val=bool(dataset.val), shots=most, trained=training.epochs > 0)
        ensembles = weight_grid(Ensemble(), tuple(loaded), scales=(1.0, 0.0), drop_zero_shot=True)
        choosing = Choosing(grid=config.grid, ensembles=tuple(ensembles))
        train = None if how == "val" else _train_images(loaded, images, choice)
        val = _val_images(loaded, dataset) if how == "val" else None
        selected = select(untrained, views, how, training, choosing, train=train, val=val)
        _log_choice(selected, config.grid)
        return cls(selected.cache, loaded, selected.estimate)

    @classmethod
    def load(cls, path: str | Path, encoders: Mapping[str, EncoderSpec], *, device: str | torch.device = "cpu") -> CaFo:
        """Load a saved cache together with the encoders that made its keys.

        Args:
            path: a file that `save` wrote, or the `cache.safetensors` of a sweep's trial.
            encoders: the encoders by the names that the cache calls them; others are ignored.
            device: where the encoders run.

        Raises:
            CafoError: the file is missing or is not a cache.
            EncoderError: an encoder is missing, cannot be loaded, or is not the one that made the keys.
        """
        cache = load_cache(path)
        if missing := {*cache.keys, cache.zero_shot_source} - set(encoders):
            raise EncoderError(f"{path} needs encoders called {', '.join(sorted(missing))}, which were not given")
        loaded = _load_encoders({name: spec for name, spec in encoders.items() if name in cache.encoders}, device)
        for name, encoder in loaded.items():
            if encoder.identity != cache.encoders[name]:
                raise EncoderError(
                    f"{path}: keys of {name} were made by {cache.encoders[name]}, not by {encoder.identity}"
                )
        return cls(cache, loaded)

    def save(self, path: str | Path) -> None:
        """Write the cache, without the encoders."""
        save_cache(self.cache, path)

    def export_onnx(self, path: str | Path) -> float:
        """Write encoders and cache as one ONNX graph, from preprocessed images to probabilities (`cafo.onnx_export`).

        Returns:
            The largest difference between a probability of the graph, in onnxruntime, and of this object.

        Raises:
            CafoError: the extra `onnx` is not installed, or the graph is too large for one file.
            EncoderError: an encoder in bf16, or one with an operator that ONNX lacks, which the message names.
        """
        return export_onnx(self.cache, self.encoders, path)

    def logits(self, images: Sequence[ImageInput]) -> Tensor:
        """Return the logits of eq. 9, (B, N), for a list of B images; see `features` for what it may hold."""
        return self.cache.logits(self.features(images))

    def features(self, images: Sequence[ImageInput]) -> dict[str, Tensor]:
        """Return the features of a list of B images by every encoder: {name: (B, C)}.

        Args:
            images: paths, bytes of files, PIL images, or arrays (H, W, 3) of uint8 or of floating point from 0 to 1.
                An image gives the same features in each of these forms; see `cafo.images.load_image`.

        Raises:
            CafoError: one image in place of a list.
            ImageError: an image that cannot be read.
        """
        if isinstance(images, str | bytes | Path | Image.Image) or getattr(images, "ndim", 4) < 4:
            raise CafoError(
                f"images should be a list of images, got one: {_first_chars(images)}; put it in brackets: [image]"
            )
        return _encode(self.encoders, images)

    def predict(self, images: Sequence[ImageInput], *, top: int = 1, coverage: float | None = None) -> list[Prediction]:
        """Return the likeliest classes of each image of a list, which may hold the same as that of `features`.

        The probabilities are calibrated on held-out images; a classifier that was fitted without any, for example on
        one image per class, gives the plain softmax of its logits.

        Args:
            images: as for `features`.
            top: number of classes to return.
            coverage: the probability, such as 0.9, with which an image's class should be in its prediction set; None
                for no sets.

        Raises:
            CafoError: one image in place of a list, a `top` below 1, or a coverage that the held-out images are too few
                for.
            ImageError: an image that cannot be read.
        """
        return predict(self.cache, self.logits(images), top, coverage)


def _open_dataset(data: Dataset | str | Path, seed: int) -> Dataset:
    """Return a data set that a classifier can be fitted on; log its notices."""
    dataset = data if isinstance(data, Dataset) else load_tree(data, seed=seed)
    if len(dataset.class_names) < 2:
        raise DatasetError(f"{dataset.name} has one class, and a classifier needs two or more")
    for notice in dataset.notices:
        logger.warning("%s: %s", dataset.name, notice)
    return dataset


def _load_encoders(specs: Mapping[str, EncoderSpec], device: str | torch.device) -> dict[str, ImageEncoder]:
    return {name: load_encoder(spec, device) for name, spec in specs.items()}


def _read_sentences(
    dataset: Dataset, prompts: Mapping[str, Sequence[str]] | str | Path | None
) -> Mapping[str, Sequence[str]]:
    if prompts is None:
        return template_prompts(dataset.templates, dataset.class_names)
    return prompts if isinstance(prompts, Mapping) else read_prompts(prompts, dataset.class_names)


def _choose_shots(dataset: Dataset, shots: int | None, seed: int) -> FewShot:
    """Choose K training images of every class, or all."""
    most = max(Counter(item.label for item in dataset.train).values(), default=0)
    shots = most if shots is None else shots
    return fewshot.choose(dataset.train, dataset.class_names, shots=shots, seed=seed, short="report")


def _val_images(encoders: Mapping[str, ImageEncoder], dataset: Dataset) -> tuple[dict[str, Tensor], Tensor]:
    """Return features and labels of the validation images."""
    features = _encode(encoders, [dataset.image_root / item.path for item in dataset.val])
    return features, torch.tensor([item.label for item in dataset.val])


def _train_images(
    encoders: Mapping[str, ImageEncoder], images: Sequence[tuple[Path, Item]], choice: FewShot
) -> TrainingImages:
    """Return the labelled ones of the keys' images, which come first, as a choice sees them."""
    paths = [folder / item.path for folder, item in images]
    first: dict[bytes, int] = {}
    groups = [first.setdefault(hashlib.sha256(path.read_bytes()).digest(), row) for row, path in enumerate(paths)]
    labelled = len(choice.items)
    return TrainingImages(
        features=_encode(encoders, paths[:labelled]), rows=torch.arange(labelled), groups=torch.tensor(groups)
    )


def _log_choice(selected: Selected, grid: BetaGrid) -> None:
    """Log the estimated accuracy, the parts that hurt, and what is at the edge of its range."""
    if selected.estimate is not None:
        logger.info("estimated accuracy: %s", selected.estimate)
    if selected.search is not None:
        for text in selected.search.hurtful_parts():
            logger.info("%s", text)
    if notice := grid.edge_notice(selected.cache.alpha, selected.cache.beta):
        logger.warning("%s", notice)


def _first_chars(value: object) -> str:
    return repr(value)[:60] if isinstance(value, str | Path) else type(value).__name__


def _encode(encoders: Mapping[str, ImageEncoder], images: Sequence[ImageInput]) -> dict[str, Tensor]:
    """Encode images by all encoders, each decoded once: {name: (B, C)}."""
    decoded = (load_image(image) for image in images)
    prepared = ({name: encoder.preprocess(image) for name, encoder in encoders.items()} for image in decoded)
    return _encode_prepared(encoders, prepared, len(images))


def _encode_views(
    encoders: Mapping[str, ImageEncoder], images: Sequence[tuple[Path, Item]], views: int, seed: int
) -> dict[str, Tensor]:
    """Encode V augmented views of each image by all encoders, each image decoded once: {name: (V, M, C)}."""
    if not images:
        return {name: torch.empty(views, 0, encoder.width) for name, encoder in encoders.items()}
    decoded = ((load_image(root / item.path), item.path) for root, item in images)
    prepared = (
        {name: encoder.preprocess.view(image, path, view, seed) for name, encoder in encoders.items()}
        for image, path in decoded
        for view in range(views)
    )
    flat = _encode_prepared(encoders, prepared, len(images) * views)
    return {name: rows.view(len(images), views, -1).transpose(0, 1).contiguous() for name, rows in flat.items()}


def _encode_prepared(
    encoders: Mapping[str, ImageEncoder], prepared: Iterable[dict[str, Tensor]], total: int
) -> dict[str, Tensor]:
    """Encode `total` preprocessed images {name: (3, S, S)} batch by batch: {name: (total, C)}."""
    batches: dict[str, list[Tensor]] = {name: [] for name in encoders}
    encoded, remaining = 0, iter(prepared)
    while batch := list(islice(remaining, _IMAGES_PER_BATCH)):
        for name, encoder in encoders.items():
            batches[name].append(encoder.encode_image(torch.stack([image[name] for image in batch])).cpu())
        encoded += len(batch)
        logger.info("%d of %d images encoded", encoded, total)
    return {
        name: torch.cat(parts) if parts else torch.empty(0, encoders[name].width) for name, parts in batches.items()
    }
