"""A small data set for CaFo's jobs: coloured images in CoOp's format, and two tiny random encoders as files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

CLIP = {
    "embed_dim": 19,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
    "text_cfg": {"context_length": 11, "vocab_size": 49408, "width": 14, "heads": 2, "layers": 1},
}
CLASSES = {"red_thing": (200, 40, 40), "green_thing": (40, 180, 60), "blue_thing": (50, 60, 210), "grey": (120,) * 3}


def make_encoders(folder: Path) -> dict[str, Any]:
    """Save an untrained CLIP and DINO-like ResNet; return the `encoders` section of a config that names them."""
    torch.manual_seed(0)
    clip = folder / "clip"
    clip.mkdir(parents=True)
    state = open_clip.CLIP(**json.loads(json.dumps(CLIP))).state_dict()
    save_file({n: t.contiguous() for n, t in state.items()}, clip / "open_clip_model.safetensors")
    (clip / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP}))
    dino = timm.create_model("test_resnet", pretrained=False, num_classes=0)
    torch.save({"teacher": {f"backbone.{n}": t for n, t in dino.state_dict().items()}}, folder / "dino.pth")
    return {
        "clip": {"kind": "clip", "name": "tiny", "weights": str(clip)},
        "dino": {"kind": "timm", "name": "test_resnet", "weights": str(folder / "dino.pth")},
    }


def make_images(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """Write noisy coloured images and their split file; `counts` is the number of images of each class by split."""
    rng = np.random.default_rng(seed)
    split: dict[str, list[list[Any]]] = {part: [] for part in counts}
    for part, count in counts.items():
        for label, (name, colour) in enumerate(CLASSES.items()):
            for i in range(count):
                # The classes overlap, so that accuracies differ between settings.
                tint = np.array(colour) + rng.normal(0, 60, 3)
                pixels = np.clip(tint + rng.normal(0, 90, (37, 41, 3)), 0, 255).astype(np.uint8)
                path = Path(part) / name / f"{i:03d}.png"
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / path)
                split[part].append([path.as_posix(), label, name])
    (folder / "split.json").write_text(json.dumps(split))
    return folder / "split.json"


def make_dataset(folder: Path, counts: dict[str, int] | None = None) -> list[str]:
    """Write images, generated images, sentences and encoders; return the overrides that name them."""
    make_images(folder / "images", counts or {"train": 6, "val": 5, "test": 7})
    make_images(folder / "generated", {"train": 3}, seed=1)
    (folder / "prompts.json").write_text(json.dumps({name: [f"a {name}", f"this is {name}"] for name in CLASSES}))
    (folder / "encoders.json").write_text(json.dumps(make_encoders(folder / "encoders")))
    return dataset_overrides(folder)


def dataset_overrides(folder: Path) -> list[str]:
    """Return the overrides that name the data set of a folder: images, sentences and encoders."""
    encoders = json.loads((folder / "encoders.json").read_text())
    return [
        f"data.split={folder / 'images' / 'split.json'}",
        f"data.generated={folder / 'generated' / 'split.json'}",
        f"data.prompts={folder / 'prompts.json'}",
        *[f"encoders.{name}.{key}={value}" for name, encoder in encoders.items() for key, value in encoder.items()],
        f"run.storage={folder / 'runs'}",
        "features.views=3",
    ]
