"""The settings of CaFo's ordinary jobs in the demo's world."""

from pathlib import Path
from typing import Any

from pydantic import Field

from rayjobs.config import config
from rayjobs.demo.captions import TEMPLATE
from rayjobs.demo.world import World

BASELINES: dict[str, dict[str, Any]] = {
    "raw pixels": {"encoders": [["clip", "pixels"]], "ensemble": ["pixels alone"]},
    "untrained DINO": {"encoders": [["clip", "untrained"]], "ensemble": ["untrained alone"]},
}
"""What few-shot images give without any pre-training."""

CASCADE: dict[str, dict[str, Any]] = {
    "DINO cache": {"encoders": [["clip", "dino"]], "ensemble": ["dino alone"]},
    "CLIP cache": {"encoders": [["clip"]]},
    "CLIP + DINO": {"encoders": [["clip", "dino"]]},
    "… + generated": {"encoders": [["clip", "dino"]], "generated": True},
    "… + sentences": {"encoders": [["clip", "dino"]], "sentences": True},
    "all of CaFo": {"encoders": [["clip", "dino"]], "generated": True, "sentences": True},
}
"""The rows of the paper's table 4."""


@config
class CascadeConfig:
    """How much of CaFo is tried."""

    shots: list[int] = Field(default=[0, 1, 4, 16], min_length=1)
    """K: labelled scans of each digit."""
    seeds: list[int] = Field(default=[1, 2, 3], min_length=1)
    """Of the few-shot choice; accuracies are means over them."""
    generated: list[int] = Field(default=[1, 8], min_length=1)
    """K': drawn pictures of each digit, the best by CLIP; which of these is best is chosen on val."""
    epochs: list[int] = Field(default=[20], min_length=1)
    """Epochs of the keys' training."""


def generating(world: World, folder: Path, drawings: int, keep: int) -> dict[str, Any]:
    """Of cafo-generate."""
    return {
        "source": "folder",
        "folder": str(world.drawn),
        "data": _data(world),
        "clip": _encoders(world)["clip"],
        "candidates": drawings,
        "keep": keep,
        "run": {"name": "generated", "storage": str(folder)},
    }


def cascade(settings: CascadeConfig, world: World, drawn: str, folder: Path, cache: Path) -> dict[str, Any]:
    """Of cafo-tune and cafo-eval. `drawn` is the list that cafo-generate wrote."""
    methods = {}
    for name, row in {**BASELINES, **CASCADE}.items():
        sentences = ["file" if row.get("sentences") else "templates"]
        generated = settings.generated if row.get("generated") else [0]
        methods[name] = {**row, "sentences": sentences, "generated": generated}
    return {
        "data": {**_data(world), "generated": drawn},
        "encoders": _encoders(world),
        # a mirrored digit is none, and where in the picture a stroke lies is what tells digits apart
        "features": {"views": 4, "min_area": 0.9, "flips": False},
        "space": {
            "shots": settings.shots,
            "seeds": settings.seeds,
            "epochs": settings.epochs,
            "alpha": [8.0],  # the tiny CLIP is as sure at 12 as the real one is at 100
            "methods": methods,
        },
        "search": {"beta_high": 50.0, "beta_steps": 100},
        "run": {"name": "cafo", "storage": str(folder), "cache": str(cache)},
    }


def _data(world: World) -> dict[str, Any]:
    return {
        "name": "digits",
        "split": str(world.digits / "split.json"),
        "prompts": str(world.digits / "prompts.json"),
        "templates": [TEMPLATE],
    }


def _encoders(world: World) -> dict[str, Any]:
    return {
        "clip": {"kind": "clip", "name": "tiny", "weights": str(world.clip)},
        "dino": {"kind": "timm", "weights": str(world.dino)},
        "untrained": {"kind": "timm", "name": str(world.dino), "weights": "random:0"},
        "pixels": {"kind": "pixels", "name": "8"},
    }
