"""The settings of CaFo's ordinary job in the demo's world."""

from typing import Any

from pydantic import Field

from rayjobs.config import config, to_dict
from rayjobs.demo.captions import TEMPLATE
from rayjobs.demo.gpus import share
from rayjobs.demo.world import World
from rayjobs.runs.run_dir import RunConfig

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


def cascade(settings: CascadeConfig, world: World, run: RunConfig, gpus: int) -> dict[str, Any]:
    """Of the job `cafo`, which is cafo-generate, cafo-features, cafo-tune and cafo-eval in one."""
    methods = {}
    for name, row in {**BASELINES, **CASCADE}.items():
        sentences = ["file" if row.get("sentences") else "templates"]
        generated = settings.generated if row.get("generated") else [0]
        methods[name] = {**row, "sentences": sentences, "generated": generated}
    return {
        "data": {
            "name": "digits",
            "split": str(world.digits / "split.json"),
            "prompts": str(world.digits / "prompts.json"),
            "templates": [TEMPLATE],
        },
        "encoders": {
            "clip": {"kind": "clip", "name": "tiny", "weights": str(world.clip)},
            "dino": {"kind": "timm", "weights": str(world.dino)},
            "untrained": {"kind": "timm", "name": str(world.dino), "weights": "random:0"},
            "pixels": {"kind": "pixels", "name": "8"},
        },
        "generate": {
            "source": "folder",
            "folder": str(world.drawn),
            "candidates": 2 * max(settings.generated),
            "keep": max(settings.generated),
        },
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
        "trials": {"workers": 2, "gpus_per_worker": share(gpus, 2)},
        "run": to_dict(run),
    }
