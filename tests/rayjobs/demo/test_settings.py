"""What the demo gives its parts where there are GPUs."""

from pathlib import Path

import pytest

from rayjobs.config import load
from rayjobs.demo.adapter_settings import instruction_train_settings
from rayjobs.demo.cafo_settings import cafo_job_settings
from rayjobs.demo.config import AdaptersConfig, CascadeConfig, WorldConfig
from rayjobs.demo.world import gpu_share, worker_count, world_paths
from rayjobs.jobs import adapter_train, cafo
from rayjobs.runs.run_dir import RunConfig


@pytest.mark.parametrize(
    ("gpus", "training", "of_four", "of_two"), [(0, 2, 0, 0), (1, 1, 0.25, 0.5), (2, 2, 0.5, 1), (8, 2, 1, 1)]
)
def test_one_gpu_is_used_by_all_parts(tmp_path: Path, gpus: int, training: int, of_four: float, of_two: float) -> None:
    assert (worker_count(gpus, 2), gpu_share(gpus, 4), gpu_share(gpus, 2)) == (training, of_four, of_two)
    world, run = world_paths(tmp_path, WorldConfig()), RunConfig(name="x", storage=str(tmp_path))
    taught = instruction_train_settings(AdaptersConfig(), tmp_path, tmp_path, {"name": "x"}, gpus)
    scale = load(adapter_train.Config, taught).scale
    assert (scale.workers.max, scale.threads_per_worker) == (training, 1)
    assert load(cafo.Config, cafo_job_settings(CascadeConfig(), world, run, gpus)).trials.gpus_per_worker == of_two
