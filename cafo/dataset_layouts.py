"""Folders and files of CaFo's eleven data sets, and the sentence templates of each.

CaFo (arXiv 2303.02151), section 4.1, in CoOp's folder layout under one data root.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cafo.errors import CafoError, refuse_text

PHOTO_TEMPLATES = ("a photo of a {}.",)
"""The sentence of a data set that has none of its own."""

IMAGENET_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""CLIP's seven templates for ImageNet."""


@dataclass(frozen=True, kw_only=True)
class DatasetLayout:
    """Folders, split file and templates of one of the eleven sets."""

    folder: str
    """folder of the set under the data root"""
    images: str
    """folder of the images below `folder`; empty where it is `folder` itself"""
    split: str = ""
    """name of CoOp's split file in `folder`; empty where the set has lists of its own"""
    templates: tuple[str, ...] = PHOTO_TEMPLATES
    stable_diffusion: str = ""
    """folder of Stable Diffusion's images; empty where it is `sd_<folder>`"""


LAYOUTS: Mapping[str, DatasetLayout] = {
    "imagenet": DatasetLayout(folder="imagenet", images="images", templates=IMAGENET_TEMPLATES),
    "stanford_cars": DatasetLayout(folder="stanford_cars", images="", split="split_zhou_StanfordCars.json"),
    "ucf101": DatasetLayout(
        folder="ucf101",
        images="UCF-101-midframes",
        split="split_zhou_UCF101.json",
        templates=("a photo of a person doing {}.",),
    ),
    "caltech101": DatasetLayout(
        folder="caltech-101",
        images="101_ObjectCategories",
        split="split_zhou_Caltech101.json",
        stable_diffusion="sd_caltech_101",
    ),
    "oxford_flowers": DatasetLayout(
        folder="oxford_flowers",
        images="jpg",
        split="split_zhou_OxfordFlowers.json",
        templates=("a photo of a {}, a type of flower.",),
    ),
    "sun397": DatasetLayout(folder="sun397", images="SUN397", split="split_zhou_SUN397.json"),
    "dtd": DatasetLayout(
        folder="dtd", images="images", split="split_zhou_DescribableTextures.json", templates=("{} texture.",)
    ),
    "eurosat": DatasetLayout(
        folder="eurosat",
        images="2750",
        split="split_zhou_EuroSAT.json",
        templates=("a centered satellite photo of {}.",),
    ),
    "fgvc_aircraft": DatasetLayout(
        folder="fgvc_aircraft", images="images", templates=("a photo of a {}, a type of aircraft.",)
    ),
    "oxford_pets": DatasetLayout(
        folder="oxford_pets",
        images="images",
        split="split_zhou_OxfordPets.json",
        templates=("a photo of a {}, a type of pet.",),
    ),
    "food101": DatasetLayout(
        folder="food-101",
        images="images",
        split="split_zhou_Food101.json",
        templates=("a photo of {}, a type of food.",),
    ),
}

TEST_ONLY = ("imagenet_v2", "imagenet_sketch")
"""Test sets of the distribution shift: the cache is made on ImageNet and tested on these."""


def check_templates(templates: Sequence[str], kind: str = "template") -> None:
    """Check that there are sentences, each with one `{}` for the class name and no other braces.

    Args:
        templates: the sentences.
        kind: what a sentence is, for the message: `template` or `command`.

    Raises:
        CafoError: there is none, or text in place of the list, or a sentence has no `{}`, several, or other braces.
    """
    refuse_text(templates, f"{kind}s")
    if not templates:
        raise CafoError(f"there should be at least one {kind}")
    for sentence in templates:
        rest = sentence.replace("{}", "", 1)
        if "{}" not in sentence or "{" in rest or "}" in rest:
            raise CafoError(f"a {kind} needs one {{}} for the class name and no other braces, got {sentence!r}")
