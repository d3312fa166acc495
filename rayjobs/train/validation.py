"""The held-out loss of a training run: of the whole validation split, and of each of its sets."""

from typing import Any

import torch
import torch.distributed as dist

from rayjobs.data.loader import load_micro_batches
from rayjobs.models.image_conditioning import ImageFeaturizer
from rayjobs.train.engine import Engine
from rayjobs.train.train_job import TrainJob


def measure_validation(
    engine: Engine, featurizer: ImageFeaturizer, job: TrainJob, rank: int, world: int
) -> dict[str, Any]:
    """Return `val_loss`, the mean loss per labelled token of the validation split, as a part of a row of metrics.

    If several sets have held-out records, `val_losses` has the mean of each, {set: loss}. All workers must call it.
    """
    samplers = job.val_samplers()
    totals = torch.zeros(len(samplers), 2, dtype=torch.float64, device=engine.device)  # loss, labelled tokens
    engine.deepspeed.eval()
    with torch.no_grad():
        for total, sampler in zip(totals, samplers.values(), strict=True):
            for micro in load_micro_batches(sampler, rank, world, range(sampler.steps_per_epoch)):
                total[0] += engine.loss(micro.tokens, micro.labels, featurizer.images(micro.images))
                total[1] += micro.step_labels if micro.last and rank == 0 else 0
    engine.deepspeed.train()
    dist.all_reduce(totals)
    loss, labels = totals.sum(0)
    row: dict[str, Any] = {"val_loss": float(loss / labels)}
    if len(samplers) > 1:
        row["val_losses"] = dict(zip(samplers, (totals[:, 0] / totals[:, 1]).tolist(), strict=True))
    return row
