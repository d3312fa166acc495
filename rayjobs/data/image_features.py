"""Prepare the images of instruction records: encode them once into a feature store, or stream them as pixels."""

from collections.abc import Sequence
from pathlib import Path

from rayjobs.cluster.worker_pool import WorkerPoolConfig
from rayjobs.data.image_source import ImageSource, StoredFeatures, StreamedImages
from rayjobs.data.records import Source
from rayjobs.models.image_conditioning import ImageConditioning, VisionConfig
from rayjobs.storage.paths import resolve_path


def prepare_image_source(
    vision: VisionConfig,
    conditioning: ImageConditioning,
    sources: Sequence[Source],
    lists: Path,
    cache: Path,
    scale: WorkerPoolConfig,
    seed: int,
) -> ImageSource:
    """Return the source of the images of records; with `vision.mode` "stored", all of them are encoded first.

    Args:
        vision: how images are used.
        conditioning: the encoder.
        sources: the sources of the records.
        lists: JSON file with the image paths of each source.
        cache: the cache folder, for stored features.
        scale: the workers that encode.
        seed: seed of augmented views.
    """
    if vision.mode == "streamed":
        return StreamedImages(
            lists=lists,
            roots={number: source.images for number, source in enumerate(sources)},
            preprocess=conditioning.encoder.preprocess,
            seed=seed if vision.augment else None,
            min_area=vision.min_area,
            flips=vision.flips,
        )
    from cafo.datasets import Item
    from rayjobs.data.config import FeaturesConfig
    from rayjobs.data.feature_store import FeatureStore
    from rayjobs.data.image_list import plain_list

    store = FeatureStore(
        encoders={"encoder": conditioning.encoder},
        settings=FeaturesConfig(batch=vision.batch),
        cache=cache,
        workers=scale.workers.max,
        resources=scale.resources(),
    )
    image_lists = [
        plain_list(str(number), resolve_path(source.images), [Item(path, 0, "") for path in source.image_paths()])
        for number, source in enumerate(sources)
    ]
    folders = store.fill([images for images in image_lists if images.items])
    return StoredFeatures(folders={int(role): stores["encoder"] for role, stores in folders.items()}, lists=lists)
