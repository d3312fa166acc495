"""The readers of `cafo/`: images, splits, class folders, descriptions, encoders and classifiers."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from cafo.cache import Cache, load_cache, save_cache
from cafo.calibration import Calibration
from cafo.datasets import load_generated_list, load_split
from cafo.encoder_spec import EncoderSpec
from cafo.encoder_weights import read_state
from cafo.encoders import load_encoder
from cafo.ensemble import Ensemble
from cafo.errors import CafoError
from cafo.image_trees import load_tree
from cafo.images import load_image
from cafo.methods.nearest_mean import ClassMeans, NearestMean
from cafo.methods.saved import FewShotClassifier, TrainingFile, load_classifier, save_classifier
from cafo.prompt import read_prompts
from tests.fuzz.target import Target

CLASSES = ("cat", "dog", "red fox")
SIDE = 6
IMAGES = {
    "png": ("RGB", {}), "palette.png": ("P", {}), "grey16.png": ("I;16", {}), "jpg": ("RGB", {}), "gif": ("P", {}),
    "webp": ("RGBA", {}), "tiff": ("CMYK", {}), "bmp": ("1", {}), "ppm": ("RGB", {}), "tga": ("RGB", {}),
}  # fmt: skip


def picture(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE + 1, 3), np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(pixels).convert(mode)


def write_images(folder: Path) -> None:
    for name, (mode, options) in IMAGES.items():
        picture(mode).save(folder / f"image.{name}", **options)


def read_images(folder: Path) -> None:
    """Read each image, whatever became of the others: one is damaged."""
    errors = []
    for name in IMAGES:
        try:
            load_image(folder / f"image.{name}")
        except CafoError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def write_split(folder: Path) -> None:
    items = {
        part: [[f"{part}/{name}/{i}.png", label, name] for label, name in enumerate(CLASSES) for i in range(2)]
        for part in ("train", "val", "test")
    }
    (folder / "split.json").write_text(json.dumps(items))
    (folder / "generated.json").write_text(json.dumps({"train": items["train"]}))
    (folder / "prompts.json").write_text(json.dumps({name: [f"a {name}.", "an animal"] for name in CLASSES}))


def read_split(folder: Path) -> None:
    dataset = load_split(folder / "split.json", folder)
    dataset.open_test()
    load_generated_list(folder / "generated.json", CLASSES)
    read_prompts(folder / "prompts.json", CLASSES)


def write_tree(folder: Path) -> None:
    for name in CLASSES:
        (folder / name).mkdir()
        for number in range(3):
            picture().save(folder / name / f"{number}.png")


def read_tree(folder: Path) -> None:
    dataset = load_tree(folder)
    dataset.open_test()
    for item in dataset.train:
        load_image(dataset.image_root / item.path)


def features(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, width, generator=generator) for name, width in (("clip", 5), ("dino", 4))}


def write_cache(folder: Path) -> None:
    labels = torch.arange(3).repeat(2)
    cache = Cache(
        keys=features(6),
        labels=labels,
        classifier=torch.randn(5, 3),
        class_names=CLASSES,
        zero_shot_source="clip",
        encoders={"clip": "RN50-abc", "dino": "dino-abc"},
        alpha=0.5,
        beta=2.0,
        ensemble=Ensemble(sources=("clip", "dino"), temperature=3.0, scales={"dino": 0.5}),
        calibration=Calibration(temperature=1.5, scores=torch.rand(7)),
        key_names=tuple(f"{i}.png" for i in range(6)),
    )
    save_cache(cache, folder / "cache.safetensors")


def read_cache(folder: Path) -> None:
    cache = load_cache(folder / "cache.safetensors")
    wanted = {name: torch.randn(2, keys.shape[1]) for name, keys in cache.keys.items()}
    cache.require(wanted)
    cache.logits(wanted)


def write_classifier(folder: Path) -> None:
    classifier = FewShotClassifier(
        name="nearest class mean",
        method=NearestMean(),
        fitted=ClassMeans(torch.randn(3, 5)),
        setting={"alpha": 0.0},
        class_names=CLASSES,
        source="clip",
        encoders={"clip": "RN50-abc"},
        images=tuple(TrainingFile(f"{i}.png", "cat", "") for i in range(2)),
        seed=0,
    )
    save_classifier(classifier, folder / "rival.safetensors")


def read_classifier(folder: Path) -> None:
    classifier = load_classifier(folder / "rival.safetensors")
    classifier.logits(features(2))


CLIP: dict[str, Any] = {
    "embed_dim": 6,
    "vision_cfg": {"image_size": 8, "layers": 1, "width": 4, "head_width": 2, "patch_size": 4},
    "text_cfg": {"context_length": 5, "vocab_size": 49408, "width": 2, "heads": 1, "layers": 1},
}


def write_clip(folder: Path) -> None:
    import open_clip

    torch.manual_seed(0)
    state = open_clip.CLIP(**json.loads(json.dumps(CLIP))).state_dict()
    save_file({name: one.contiguous() for name, one in state.items()}, folder / "open_clip_model.safetensors")
    config = {"model_cfg": CLIP, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def read_clip(folder: Path) -> None:
    load_encoder(EncoderSpec(kind="clip", name="tiny", weights=str(folder)))


def write_timm(folder: Path) -> None:
    import timm

    shape = {"channels": [4, 4, 4, 4], "stem_width": 4, "num_classes": 0}
    network = timm.create_model("resnet10t", **shape)
    timm.models.save_for_hf(network, folder, safe_serialization=True, data_config={"input_size": (3, 32, 32)})


def read_timm(folder: Path) -> None:
    load_encoder(EncoderSpec(kind="timm", weights=str(folder)))


def write_weights(folder: Path) -> None:
    state = {"backbone.conv.weight": torch.ones(2, 3), "backbone.conv.bias": torch.zeros(2, dtype=torch.float16)}
    torch.save({"teacher": state, "epoch": 3}, folder / "dino.pth")


def read_weights(folder: Path) -> None:
    read_state(folder / "dino.pth")


def png_bytes() -> bytes:
    out = io.BytesIO()
    picture().save(out, "PNG")
    return out.getvalue()


Reader = Callable[[Path], object]
TARGETS = (
    Target(name="images", make=write_images, read=read_images, share=6),
    Target(name="splits", make=write_split, read=read_split, share=8),
    Target(name="class-folders", make=write_tree, read=read_tree, share=3),
    Target(name="cache", make=write_cache, read=read_cache, share=6),
    Target(name="rival", make=write_classifier, read=read_classifier, share=4),
    Target(name="encoder-clip", make=write_clip, read=read_clip, damaged=("*.json",), share=1, quick=False),
    Target(name="encoder-timm", make=write_timm, read=read_timm, damaged=("*.json",), share=1, quick=False),
    Target(name="encoder-weights", make=write_weights, read=read_weights, share=3),
)
