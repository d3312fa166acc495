"""The demo's task: scikit-learn's handwritten digits, 1,797 scans, as an ordinary data set of image files."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cafo.datasets import stable_uniform
from rayjobs.demo.captions import descriptions
from rayjobs.demo.config import DigitsConfig
from rayjobs.demo.font_digits import enlarge
from rayjobs.demo.notes import NAMES
from rayjobs.errors import ConfigError
from rayjobs.storage.files import write_json


def split_scans(settings: DigitsConfig) -> dict[str, list[tuple[str, Tensor, int]]]:
    """{split: (name, image (S, S) from 0 to 1, digit) of each scan}. Raises ConfigError if there are too few scans."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = enlarge(torch.from_numpy(scans.images).float())
    order = sorted(range(len(images)), key=lambda i: stable_uniform(settings.seed, str(i)))
    splits, start = {}, 0
    for split in ("train", "val", "test"):
        stop = start + getattr(settings, split)
        splits[split] = [(f"{i:04d}", images[i], int(scans.target[i])) for i in order[start:stop]]
        start = stop
    if start > len(images):
        raise ConfigError(f"digits: train, val and test add up to {start}, and there are {len(images)} scans")
    return splits


def write_digits(settings: DigitsConfig, folder: Path) -> None:
    """Write the images by class, `split.json` in CoOp's format, and `prompts.json` in CaFo's format."""
    split: dict[str, list[list[str | int]]] = {}
    for part, scans in split_scans(settings).items():
        split[part] = []
        for name, image, digit in scans:
            path = Path(NAMES[digit]) / f"{name}.png"
            save_image(image, folder / path)
            split[part].append([path.as_posix(), digit, NAMES[digit]])
    write_json(folder / "prompts.json", descriptions())
    write_json(folder / "split.json", split)


def save_image(image: Tensor, path: Path) -> None:
    """Write an image (S, S) from 0 to 1 as a grey PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image * 255).round().byte().numpy()).save(path)
