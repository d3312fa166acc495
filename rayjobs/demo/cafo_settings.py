"""Settings of the demo's CaFo job."""

from typing import Any

from rayjobs.config import to_dict
from rayjobs.demo.captions import TEMPLATE
from rayjobs.demo.config import CascadeConfig
from rayjobs.demo.world import World, gpu_share
from rayjobs.runs.run_dir import RunConfig

BASELINES: dict[str, dict[str, Any]] = {
    "raw pixels": {"encoders": [["clip", "pixels"]], "ensemble": ["pixels alone"]},
    "untrained DINO": {"encoders": [["clip", "untrained"]], "ensemble": ["untrained alone"]},
}
"""Methods without any pre-training, for comparison: each with the hyperparameters that it restricts."""

CASCADE: dict[str, dict[str, Any]] = {
    "DINO cache": {"encoders": [["clip", "dino"]], "ensemble": ["dino alone"]},
    "CLIP cache": {"encoders": [["clip"]]},
    "CLIP + DINO": {"encoders": [["clip", "dino"]]},
    "… + generated": {"encoders": [["clip", "dino"]], "generated": True},
    "… + sentences": {"encoders": [["clip", "dino"]], "sentences": True},
    "all of CaFo": {"encoders": [["clip", "dino"]], "generated": True, "sentences": True},
}
"""The rows of the paper's table 4."""


def cafo_job_settings(settings: CascadeConfig, world: World, run: RunConfig, gpus: int) -> dict[str, Any]:
    """Settings of the job cafo, which runs cafo-generate, cafo-tune and cafo-eval."""
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
            "folder": str(world.generated_images),
            "candidates": 2 * max(settings.generated),
            "keep": max(settings.generated),
        },
        # a mirrored digit is no digit, and digits differ in where their strokes are
        "features": {"views": 4, "min_area": 0.9, "flips": False},
        "space": {
            "shots": settings.shots,
            "seeds": settings.seeds,
            "epochs": settings.epochs,
            "alpha": [8.0],  # the logit scale of the tiny CLIP is about 12, that of the real one 100
            "methods": methods,
        },
        "search": {"beta_high": 50.0, "beta_steps": 100},
        "trials": {"workers": 2, "gpus_per_worker": gpu_share(gpus, 2)},
        "run": to_dict(run),
    }
