"""What workers read and decode of the training data, and the memory of a data set larger than the object store.

    python -m benchmarks.data_scaling [--records 20480] [--images 1024] [--json FILE]
    python -m benchmarks.data_scaling --stream [--store-mib 80] [--kinds tokens features images]

The first command makes a store of records with Alpaca's lengths (log-normal, 128 tokens on average), image features of
4 KiB and JPEG files. It drives an epoch of the loader for every worker of 1, 2, 4 and 8, one after the other in one
process without Ray, and counts what each reads: bytes of index, records and images; records and images decoded; CPU
seconds.

The second streams a data set of four times the object store through the loader in a Ray cluster of its own, and takes
the highest use of the object store and of private memory in the first and in the last quarter of the steps.
"""

import argparse
import io
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from cafo.images import Preprocess
from rayjobs.data.feature_part import part_name
from rayjobs.data.feature_part import write_part as write_features
from rayjobs.data.image_source import IMAGES_PER_PART, ImageSource, StoredFeatures, StreamedImages
from rayjobs.data.sampler import ElasticBatchSampler, window_micro_batches
from rayjobs.data.token_part import part_name as record_part_name
from rayjobs.data.token_part import write_part as write_records
from rayjobs.data.token_store import RECORDS_PER_CHUNK, TokenStore
from rayjobs.reporting.tables import markdown_table
from rayjobs.storage.files import write_bytes, write_json
from rayjobs.storage.hub_model import format_bytes

WORLDS = (1, 2, 4, 8)
MIB = 1 << 20
STORE_SIZE = "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES"


def make_store(folder: Path, records: int, tokens: int | None = None, images: int = 0) -> TokenStore:
    """Write records of random tokens.

    Args:
        folder: folder to write to.
        records: number of records.
        tokens: tokens of each; by default they are distributed as Alpaca's.
        images: number of images, which the records name in turn; 0 for none.
    """
    rng, parts = np.random.default_rng(0), []
    for first in range(0, records, RECORDS_PER_CHUNK):
        listed = []
        for id in range(first, min(first + RECORDS_PER_CHUNK, records)):
            length = tokens or int(np.clip(rng.lognormal(4.72, 0.5), 20, 512))
            image = id % images if images else None
            values = rng.integers(0, 32000, length).tolist()
            listed.append({"id": id, "tokens": values, "label_spans": [[length // 2, length]], "image": image})
        name = record_part_name("train", first)
        write_records(f"{folder}/{name}", listed)
        parts.append((name, len(listed)))
    return TokenStore(folder=str(folder), parts={"train": parts, "val": []}, rejected=0)


def make_features(folder: Path, images: int, width: int) -> StoredFeatures:
    """Write random features of so many images, each of `width` values."""
    rng = np.random.default_rng(1)
    for first in range(0, images, IMAGES_PER_PART):
        listed = range(first, min(first + IMAGES_PER_PART, images))
        write_features(
            str(folder / part_name(first)), listed, rng.normal(size=(len(listed), width)).astype(np.float32), 1, []
        )
    return StoredFeatures(folders={0: folder}, lists=folder / "images.json")


def make_images(folder: Path, images: int) -> StreamedImages:
    """Write JPEG files of 240 x 320 pixels."""
    rng, names = np.random.default_rng(2), [f"{number:06d}.jpg" for number in range(images)]
    for name in names:
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        content = io.BytesIO()
        coarse.resize((320, 240), Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
        write_bytes(folder / name, content.getvalue())
    write_json(folder / "images.json", {"0": names})
    preprocess = Preprocess(size=224, resize=224)
    return StreamedImages(lists=folder / "images.json", roots={0: str(folder)}, preprocess=preprocess, seed=None)


def make_sampler(store: TokenStore, images: ImageSource | None, window: int = 8192) -> ElasticBatchSampler:
    """Return the order of training in steps of 64 records."""
    return ElasticBatchSampler(
        store=store,
        split="train",
        global_batch=64,
        token_budget=4096,
        shuffle_records=window,
        seed=0,
        images=images,
    )


def count_reads(sampler: ElasticBatchSampler, rank: int, world: int) -> dict[str, float]:
    """Return what a worker reads in an epoch, and the CPU seconds that it takes."""
    read, began = Counter[str](), time.process_time()
    for window in range(sampler.windows_per_epoch):
        batch = {"epoch": [0], "window": [window]}
        for table in window_micro_batches(batch, sampler, range(sampler.steps_per_epoch), rank, world):
            for of_micro in table["read"].to_pylist():
                read.update(of_micro)
    return {**read, "seconds": time.process_time() - began}


def measure_reads(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return a row for each kind of data and number of workers."""
    samplers = {
        "text": make_sampler(make_store(folder / "text", args.records), None),
        "features": make_sampler(
            make_store(folder / "a", args.images, images=args.images),
            make_features(folder / "features", args.images, 1024),
        ),
        "images": make_sampler(
            make_store(folder / "b", args.images, images=args.images), make_images(folder / "images", args.images)
        ),
    }
    rows = []
    for kind, sampler in samplers.items():
        alone: dict[str, float] = {}
        count_reads(sampler, 0, 1)  # the first is slower
        for world in WORLDS:
            workers = [count_reads(sampler, rank, world) for rank in range(world)]
            total = {name: sum(worker[name] for worker in workers) for name in workers[0]}
            alone = alone or total
            most = max(worker["bytes"] for worker in workers)
            rows.append({"data": kind, "workers": world, "most_bytes": most, **total})
            rows[-1] |= {f"{name}_ratio": total[name] / alone[name] for name in ("bytes", "seconds")}
    return rows


def show_reads(rows: list[dict[str, Any]]) -> None:
    """Print the table of what was read."""
    columns = ["data", "workers", "most of a worker", "all", "of one worker's", "records", "images", "CPU of one's"]
    cells = [
        [
            row["data"],
            str(row["workers"]),
            format_bytes(row["most_bytes"]),
            format_bytes(row["bytes"]),
            f"{row['bytes_ratio']:.3f}",
            f"{row['records']:,}",
            f"{row['images']:,}",
            f"{row['seconds_ratio']:.2f}",
        ]
        for row in rows
    ]
    print(markdown_table(columns, cells))


@dataclass
class Use:
    """Highest use of memory, in bytes."""

    store: int = 0
    """object store"""
    spilled: int = 0
    """written to disk by the object store since the cluster began"""
    private: int = 0
    """private memory of this process and all below it"""


class MemoryWatch(threading.Thread):
    """Notes every half second the use of memory, into the `Use` that is current."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.use = Use()
        self.stopped = threading.Event()

    def run(self) -> None:
        """Watch until the event `stopped`."""
        from ray._private import internal_api  # Ray has no public figure of what the object store holds
        from ray._private.state import state

        while not self.stopped.wait(0.5):
            stats = internal_api.get_memory_info_reply(state).store_stats
            use = self.use
            use.store = max(use.store, stats.object_store_bytes_used)
            use.spilled = max(use.spilled, stats.spilled_bytes_total)
            processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
            use.private = max(use.private, sum(map(private_bytes, processes)))


def private_bytes(process: psutil.Process) -> int:
    """Return the resident memory of a process that it shares with no other, 0 if it has ended."""
    try:
        memory = process.memory_info()
    except psutil.Error:
        return 0
    return int(memory.rss - memory.shared)


def make_streamed(kind: str, folder: Path, size: int) -> ElasticBatchSampler:
    """Make a data set of a kind that is `size` bytes as the loader sends it."""
    if kind == "tokens":
        return make_sampler(make_store(folder, size // 4 // 512, tokens=512), None)
    if kind == "features":
        images = size // (64 * 1024)
        return make_sampler(make_store(folder / "a", images, 16, images), make_features(folder, images, 16 * 1024))
    images = size // (4 * 3 * 224 * 224)
    return make_sampler(make_store(folder / "a", images, 16, images), make_images(folder, images))


def measure_streams(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return a row for each kind of data, after it is shown."""
    from rayjobs.cluster.ray_init import connect

    connect()
    import ray

    from rayjobs.data.loader import load_micro_batches

    rows = []
    for kind in args.kinds:
        sampler = make_streamed(kind, folder / kind, 4 * args.store_mib * MIB)
        watch = MemoryWatch()
        watch.start()
        sent, uses = 0, [Use() for _ in range(4)]
        for micro in load_micro_batches(sampler, 0, 1, range(sampler.steps_per_epoch)):
            watch.use = uses[4 * micro.step // sampler.steps_per_epoch]
            sent += 4 * micro.n_tokens + sum(len(image) for image in micro.images if image)
        watch.stopped.set()
        watch.join()
        rows.append({"data": kind, "sent": sent, "first": vars(uses[0]), "last": vars(uses[3])})
        show_streams(rows, args.store_mib * MIB)
    ray.shutdown()
    return rows


def show_streams(rows: list[dict[str, Any]], store: int) -> None:
    """Print the table of the use of memory."""
    columns = [
        "data",
        "sent",
        "object store, first quarter",
        "last",
        "private memory, first quarter",
        "last",
        "spilled",
    ]
    cells = [
        [
            row["data"],
            format_bytes(row["sent"]),
            *(format_bytes(row[quarter]["store"]) for quarter in ("first", "last")),
            *(format_bytes(row[quarter]["private"]) for quarter in ("first", "last")),
            format_bytes(row["last"]["spilled"]),
        ]
        for row in rows
    ]
    print(f"object store: {format_bytes(store)}\n\n{markdown_table(columns, cells)}", flush=True)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=20480)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--stream", action="store_true", help="measure memory")
    parser.add_argument("--store-mib", type=int, default=80, help="size of the object store; Ray takes 75 or more")
    parser.add_argument("--kinds", nargs="+", default=["features", "images", "tokens"])
    args = parser.parse_args()
    if args.stream and STORE_SIZE not in os.environ:  # which Ray reads when it is imported
        os.environ[STORE_SIZE] = str(args.store_mib * MIB)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.data_scaling", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as folder:
        rows = (measure_streams if args.stream else measure_reads)(args, Path(folder))
    if not args.stream:
        show_reads(rows)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
