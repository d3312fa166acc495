"""Measure the speed of cafo-predict against the encoder alone.

    python -m benchmarks.cafo_predict [--images 2000] [--encoder tf_efficientnet_lite0] [--workers 1] [--json]

JPEG files of 500 x 375 pixels are predicted by the job, with a cache of 1,000 classes and 4 keys of each, in shards of
256. The floor is the same encoder on the same images, decoded and preprocessed beforehand, in an actor that reserves
what one worker reserves, and so has its threads; it is measured before and after the job. Like the job's, its images
are channels last in memory, with which a CPU is faster.

floor    images/s of the encoder alone, times the number of workers
job      images/s of the job from its first shard to its last: decoding, encoding, classifying and writing
whole    images/s of the job with everything: starting Ray's processes, loading the encoder, the report
ratio    job / floor. It can reach 1 where other cores decode; on the encoder's own cores decoding takes its time.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
import torch
from PIL import Image

from cafo.cache import Cache, save_cache
from cafo.encoder_spec import EncoderSpec
from cafo.encoders import ImageEncoder, load_encoder
from cafo.ensemble import NOTHING, Ensemble
from cafo.images import load_image
from rayjobs.cluster.device import worker_device
from rayjobs.cluster.ray_init import connect
from rayjobs.cluster.worker_pool import WorkerPoolConfig
from rayjobs.config import load
from rayjobs.job_configs.cafo_predict import Config
from rayjobs.jobs import cafo_predict

CLASSES, KEYS_PER_CLASS, PER_SHARD, BATCH, FILES = 1000, 4, 256, 64, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--encoder", default="tf_efficientnet_lite0")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        figures = measure(Path(place), given.images, given.encoder, given.workers)
    for name, value in figures.items():
        print(f"{name:12} {value:.2f}")
    if given.json:
        print(json.dumps(figures))


def measure(place: Path, images: int, encoder: str, workers: int) -> dict[str, float]:
    """Write images and a classifier, and return the figures."""
    loaded = load_encoder(EncoderSpec(kind="timm", name=encoder, weights="random:0"))
    write_images(place / "images", images)
    write_classifier(place / "model.safetensors", loaded)
    pixels = torch.stack([loaded.preprocess(load_image(path)) for path in files(place)[: 4 * BATCH]])
    connect(place, place / "cache")
    before = encode_alone(encoder, pixels, images)
    started = time.monotonic()
    cafo_predict.run(
        load(
            Config,
            {"encoders": {"net": {"kind": "timm", "name": encoder, "weights": "random:0"}}},
            {
                "classifier": str(place / "model.safetensors"),
                "data.path": [str(place / "images")],
                "images_per_shard": PER_SHARD,
                "batch": BATCH,
                "scale.workers": workers,
                "run.storage": str(place / "runs"),
                "run.name": "speed",
            },
        )
    )
    whole = time.monotonic() - started
    after = encode_alone(encoder, pixels, images)
    times = sorted(path.stat().st_mtime for path in (place / "runs/speed/predictions").iterdir())
    floor = workers * (before + after) / 2
    job = (images - PER_SHARD) / (times[-1] - times[0])
    return {"floor": floor, "floor_before": before, "job": job, "whole": images / whole, "ratio": job / floor}


def files(place: Path) -> list[Path]:
    """The images' files, in order."""
    return sorted((place / "images").iterdir())


def write_images(folder: Path, count: int) -> None:
    """Write JPEG files of smooth colours and a little noise, which are as large as photos are; 200 different ones."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        if number < FILES:
            coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).resize((500, 375))
            noisy = np.asarray(coarse).astype(np.int16) + rng.integers(-12, 12, (375, 500, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:06d}.jpg", quality=90)
        else:
            (folder / f"{number:06d}.jpg").write_bytes((folder / f"{number % FILES:06d}.jpg").read_bytes())


def write_classifier(path: Path, encoder: ImageEncoder) -> None:
    """Save a cache with random keys, of one encoder, without p_ZS."""
    rng = torch.Generator().manual_seed(0)
    keys = torch.randn(CLASSES * KEYS_PER_CLASS, encoder.width, generator=rng)
    cache = Cache(
        keys={"net": torch.nn.functional.normalize(keys, dim=1)},
        labels=torch.arange(CLASSES).repeat_interleave(KEYS_PER_CLASS),
        classifier=torch.zeros(encoder.width, CLASSES),
        class_names=tuple(f"class {number}" for number in range(CLASSES)),
        zero_shot_source="net",
        encoders={"net": encoder.identity},
        ensemble=Ensemble(baseline=NOTHING),
    )
    save_cache(cache, path)


def encode_alone(encoder: str, pixels: torch.Tensor, images: int) -> float:
    """Images/s of the encoder on preprocessed images, in an actor like one of the job's."""
    resources = WorkerPoolConfig().resources()
    actor = ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))(Alone)
    alone = actor.remote(encoder, worker_device(resources))
    speed = ray.get(alone.measure.remote(pixels.numpy(), images))
    ray.kill(alone)
    return speed


class Alone:
    """An encoder in a process of its own."""

    def __init__(self, encoder: str, device: str) -> None:
        self.encoder = load_encoder(EncoderSpec(kind="timm", name=encoder, weights="random:0"), device)

    def measure(self, pixels: np.ndarray, images: int) -> float:
        batches = torch.tensor(pixels).contiguous(memory_format=torch.channels_last).split(BATCH)
        self.encoder.encode_image(batches[0])
        started, done = time.monotonic(), 0
        while done < images:
            done += len(self.encoder.encode_image(batches[done // BATCH % len(batches)]).cpu())
        return done / (time.monotonic() - started)


if __name__ == "__main__":
    main()
