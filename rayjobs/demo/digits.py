"""The demo's task: scikit-learn's handwritten digits, 1,797 real scans, as an ordinary data set of image files."""

from pathlib import Path

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from cafo.datasets import stable_uniform
from rayjobs.config import config
from rayjobs.demo.captions import sentences
from rayjobs.demo.font_digits import pictures
from rayjobs.demo.notes import NAMES
from rayjobs.errors import UserError
from rayjobs.storage.files import write_json


@config
class DigitsConfig:
    """How the scans are divided."""

    train: int = Field(default=900, ge=10)
    """Scans that few-shot images are chosen from; DINO sees them all, without labels."""
    val: int = Field(default=300, ge=10)
    """Scans that everything is chosen on."""
    test: int = Field(default=597, ge=10)
    """Scans that are scored once, at the end."""
    seed: int = Field(default=0, ge=0)
    """Of the division."""


def divided(settings: DigitsConfig) -> dict[str, list[tuple[str, Tensor, int]]]:
    """{split: (name, picture (S, S) of 0 to 1, digit) of each of its scans}. Raises ValueError for too large splits."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    drawn = pictures(torch.from_numpy(scans.images).float())
    order = sorted(range(len(drawn)), key=lambda i: stable_uniform(settings.seed, str(i)))
    found, start = {}, 0
    for split in ("train", "val", "test"):
        stop = start + getattr(settings, split)
        found[split] = [(f"{i:04d}", drawn[i], int(scans.target[i])) for i in order[start:stop]]
        start = stop
    if start > len(drawn):
        raise UserError(f"digits: train, val and test add up to {start}, and there are {len(drawn)} scans")
    return found


def write_digits(settings: DigitsConfig, folder: Path) -> None:
    """Fills a folder with images by class, a `split.json` in CoOp's form, and `prompts.json` in CaFo's."""
    split: dict[str, list[list[str | int]]] = {}
    for part, scans in divided(settings).items():
        split[part] = []
        for name, picture, digit in scans:
            path = Path(NAMES[digit]) / f"{name}.png"
            save_picture(picture, folder / path)
            split[part].append([path.as_posix(), digit, NAMES[digit]])
    write_json(folder / "prompts.json", sentences())
    write_json(folder / "split.json", split)


def save_picture(picture: Tensor, path: Path) -> None:
    """(S, S) of 0 to 1 as a grey PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((picture * 255).round().byte().numpy()).save(path)
