"""Measure the images/s of feature encoding, as cafo-features does it, against the encoder alone on ready tensors.

    python -m benchmarks.features [--encoders rn50 lite0 vit_b32] [--views 0] [--images 384] [--rounds 1] [--json]

Random weights, JPEGs of 500 x 375 pixels. For each encoder, on all cores:

    alone   batches of 64 ready tensors, in the layout in which the network was built, in the layout that the library
            chooses (channels last for convolutions), and in bf16
    job     `rayjobs.data.feature_encoding.encode_parts`: Ray Data's tasks read and decode the files, an actor encodes
            and writes. Counted from the first part that is written to the last, so without the start of the worker

Alone is measured before and after each job, so that other programs on the machine disturb both. Beside the wall time
stands the processor time per image of the whole process tree, as a share of that of the encoder alone.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
from PIL import Image

from cafo.encoder_spec import EncoderSpec
from cafo.encoders import ImageEncoder, load_encoder
from rayjobs.cluster.ray_init import connect
from rayjobs.data.feature_decoding import PartTask
from rayjobs.data.feature_encoding import encode_parts
from rayjobs.models.encoder import EncoderInfo
from rayjobs.reporting.tables import markdown_table

SPECS = {
    "rn50": EncoderSpec(kind="clip", name="RN50", weights="random:0"),
    "lite0": EncoderSpec(kind="timm", name="tf_efficientnet_lite0", weights="random:0"),
    "vit_b32": EncoderSpec(kind="clip", name="ViT-B-32", weights="random:0"),
}
BATCH = 64
ALONE_S = 3.0
"""Processor time to spend on each measurement of the encoder alone."""


def make_images(folder: Path, count: int) -> list[str]:
    """Write JPEGs of smooth noise; return their names."""
    rng, names = np.random.default_rng(0), []
    for i in range(count):
        pixels = rng.integers(0, 255, (24, 32, 3), np.uint8)
        Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
        names.append(f"{i}.jpg")
    return names


def alone(encoder: ImageEncoder, images: torch.Tensor, seconds: float) -> tuple[float, float]:
    """Return an encoder's images per second of wall time, and its processor seconds per image."""
    encoder.encode_image(images[:8])
    count, start, cpu = 0, time.perf_counter(), time.process_time()
    while count == 0 or time.process_time() - cpu < seconds:
        encoder.encode_image(images)
        count += len(images)
    return count / (time.perf_counter() - start), (time.process_time() - cpu) / count


class Watch(threading.Thread):
    """Notes, five times a second, how many parts are written and how much processor time the process tree has used."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.stopped = folder, threading.Event()
        self.samples: list[tuple[float, int, float]] = []
        self.cpu: dict[int, float] = {}

    def run(self) -> None:
        while not self.stopped.wait(0.2):
            root = psutil.Process()
            for process in [root, *root.children(recursive=True)]:
                try:
                    times = process.cpu_times()
                except psutil.Error:  # it has ended
                    continue
                self.cpu[process.pid] = times.user + times.system
            self.samples.append((time.perf_counter(), len(list(self.folder.glob("*.parquet"))), sum(self.cpu.values())))

    def rates(self, images_per_part: int) -> tuple[float, float]:
        """Return images per second, and processor seconds per image, from the first part that was seen to the last."""
        self.stopped.set()
        self.join()
        first = next(sample for sample in self.samples if sample[1])
        last = next(sample for sample in self.samples if sample[1] == self.samples[-1][1])
        images = (last[1] - first[1]) * images_per_part
        return images / (last[0] - first[0]), (last[2] - first[2]) / images


def job(spec: EncoderSpec, encoder: ImageEncoder, root: Path, names: Sequence[str], views: int) -> tuple[float, float]:
    """Return views per second and processor seconds per view of the pipeline, in steady state."""
    info = EncoderInfo(spec, encoder.identity, encoder.preprocess, spec.kind == "clip")
    per_part = max(1, BATCH // max(1, views))
    with tempfile.TemporaryDirectory() as folder:
        tasks = [
            PartTask(
                root=str(root),
                first=at,
                paths=list(names[at : at + per_part]),
                views=views,
                seed=0,
                min_area=0.5,
                flips=True,
                outputs={"encoder": f"{folder}/{at:08}.parquet"},
            )
            for at in range(0, len(names) // per_part * per_part, per_part)
        ]
        watch = Watch(Path(folder))
        watch.start()
        encode_parts(tasks, {"encoder": info}, BATCH, 1, {"CPU": 1.0})
        time.sleep(0.5)
        return watch.rates(per_part * max(1, views))


def measure(name: str, root: Path, names: Sequence[str], views: int, rounds: int) -> dict[str, Any]:
    """Return the figures of one encoder."""
    spec = SPECS[name]
    encoder, bf16 = load_encoder(spec), load_encoder(EncoderSpec(**{**vars(spec), "precision": "bf16"}))
    built = load_encoder(spec)
    built.network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    built._layout = torch.contiguous_format
    images = torch.randn(BATCH, 3, encoder.preprocess.size, encoder.preprocess.size)
    rates: dict[str, list[float]] = {
        key: [] for key in ("as_built", "alone", "bf16", "job", "of_alone", "cpu_of_alone")
    }
    for _ in range(rounds):
        rates["as_built"].append(alone(built, images, ALONE_S)[0])
        rates["bf16"].append(alone(bf16, images, ALONE_S)[0])
        before = alone(encoder, images, ALONE_S)
        got = job(spec, encoder, root, names, views)
        after = alone(encoder, images, ALONE_S)
        both = (before[0] + after[0]) / 2
        rates["alone"].append(both)
        rates["job"].append(got[0])
        rates["of_alone"].append(got[0] / both)
        rates["cpu_of_alone"].append(got[1] / ((before[1] + after[1]) / 2))
    return {key: round(statistics.median(values), 3) for key, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", choices=SPECS, default=list(SPECS))
    parser.add_argument("--views", type=int, default=0, help="augmented views of an image; 0 for the plain one")
    parser.add_argument("--images", type=int, default=384, help="images that a job encodes (default: 384)")
    parser.add_argument("--rounds", type=int, default=1, help="times that everything is measured (default: 1)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    given = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        names = make_images(Path(folder), given.images)
        connect()
        for name in given.encoders:
            figures[name] = measure(name, Path(folder), names, given.views, given.rounds)
            print(f"{name}: {figures[name]}", flush=True)
        ray.shutdown()
    rows = [
        [name, *(f"{one[key]:.1f}" for key in ("as_built", "alone", "bf16", "job")), f"{one['of_alone']:.0%}",
         f"{one['cpu_of_alone']:.2f}"]
        for name, one in figures.items()
    ]  # fmt: skip
    columns = ["encoder", "as built", "alone", "alone in bf16", "job", "of alone", "CPU time per image, of alone"]
    print(markdown_table(columns, rows))
    if given.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
