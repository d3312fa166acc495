"""The figures of a finished training run, which its `result.json` holds."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapter.adapter_file import AdapterFile
from rayjobs.storage.files import read_jsonl
from rayjobs.storage.hub_model import ADAPTER_FILE
from rayjobs.train.train_job import TrainJob


def summarize(folder: Path, job: TrainJob, file: AdapterFile, *, with_images: bool) -> dict[str, Any]:
    """Return the figures of the training run in `folder`.

    file: the adapter that came out. with_images: whether the records' images were read.
    """
    store = job.store
    rows = read_jsonl(folder / "metrics.jsonl")
    at_end: dict[str, Any] = next((row for row in reversed(rows) if "data_read" in row), {})
    losses, val_losses = ([row[name] for row in rows if name in row] for name in ("loss", "val_loss"))
    headline = f"training loss {losses[-1]:.3f}"
    if val_losses:
        headline = f"held-out loss {val_losses[0]:.3f} → {val_losses[-1]:.3f}"
    return {
        "headline": headline,
        "adapter": str(folder / ADAPTER_FILE),
        "trainable_parameters": file.trainable,
        "steps": job.total_steps,
        "train_records": store.rows("train"),
        "val_records": store.rows("val"),
        **({"train_records_with_image": store.images("train")} if with_images else {}),
        "rejected_records": store.rejected,
        **({"changed_turns": dict(store.changed_turns)} if store.changed_turns else {}),
        "data_read": at_end.get("data_read"),
        "peak_memory_bytes": at_end.get("peak_memory_bytes"),
        "train_loss": round(losses[-1], 5),
        "base_val_loss": round(val_losses[0], 5) if val_losses else None,
        "val_loss": round(val_losses[-1], 5) if val_losses else None,
        **({"sets": rows_of_sets} if (rows_of_sets := list(summarize_sets(job, rows))) else {}),
    }


def summarize_sets(job: TrainJob, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each set of a mixture: its records, and its held-out loss; none for a single set.

    rows: the rows of the run's metrics.
    """
    if len(job.sets) < 2:
        return
    held = next(iter(job.val_samplers()), "")  # the only set with held-out records, where the rows tell none apart
    measured = [row.get("val_losses", {held: row["val_loss"]}) for row in rows if "val_loss" in row] or [{}]
    sampler, held_out = job.sampler("train"), job.sampler("val")
    for number, name in enumerate(job.sets):
        row = {
            "set": name,
            "train_records": sampler.records(number),
            "train_records_per_epoch": sampler.records_per_epoch(number),
            "val_records": held_out.records(number),
        }
        for key, losses in ("base_val_loss", measured[0]), ("val_loss", measured[-1]):
            row[key] = round(losses[name], 5) if name in losses else None
        yield row
