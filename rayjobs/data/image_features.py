"""Encode the images of instruction records, or send them to the workers as pixels."""

from __future__ import annotations
from pathlib import Path
from typing import Literal, NamedTuple
import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from adapter.adapter_checkpoint import read_adapter
from adapter.image_projection import Images
from adapter.image_projection import ImageProjectionConfig as Projected
from rayjobs.cluster.worker_pool import WorkerPoolConfig
from rayjobs.config import config
from rayjobs.models.encoder import VisionEncoderConfig, EncoderInfo, load_vision_encoder
from rayjobs.data.image_source import ImageSource, StoredFeatures, StreamedImages
from rayjobs.storage.download import cached_path
from rayjobs.storage.paths import resolve_path
from rayjobs.data.records import Source
from rayjobs.models.image_conditioning import VisionConfig
from rayjobs.models.image_conditioning import ImageConditioning


def prepare_image_source(
    vision: VisionConfig,
    conditioning: ImageConditioning,
    sources: list[Source],
    lists: Path,
    cache: Path,
    scale: WorkerPoolConfig,
    seed: int,
) -> ImageSource:
    """Where training takes its images from, encoded first if they are to be stored; `lists` names them by source."""
    if vision.mode == "streamed":
        return StreamedImages(
            lists=lists,
            roots={i: source.images for i, source in enumerate(sources)},
            preprocess=conditioning.encoder.preprocess,
            seed=seed if vision.augment else None,
            min_area=vision.min_area,
            flips=vision.flips,
        )
    from cafo.datasets import Item
    from rayjobs.data.feature_store import FeaturesConfig, fill_store
    from rayjobs.data.image_list import plain_list

    wanted = [
        plain_list(str(i), resolve_path(source.images), [Item(path, 0, "") for path in source.image_paths()])
        for i, source in enumerate(sources)
    ]
    folders = fill_store(
        [images for images in wanted if images.items],
        {"encoder": conditioning.encoder},
        FeaturesConfig(batch=vision.batch),
        cache,
        workers=scale.workers.max,
        resources=scale.resources(),
    )
    return StoredFeatures(folders={int(role): found["encoder"] for role, found in folders.items()}, lists=lists)
