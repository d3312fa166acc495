"""Compare the memory and time that a dry run of adapter-train estimates with those of real steps, on the CPU.

    python -m benchmarks.cost_estimate --config smollm2 base.path=SmolLM2-135M-Instruct data.path=records.jsonl

Both run in processes of their own, with one thread. Times are the process's CPU time, so that other programs do not
count; memory is the peak of the resident set, of a process without Ray.
"""

import argparse
import os
import random
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from adapter.batching import collate
from rayjobs.cluster.environment import set_environment
from rayjobs.config import load
from rayjobs.data.sampler import assign_micro_batches
from rayjobs.job_configs.adapter_train import Config
from rayjobs.jobs.adapter_train import check
from rayjobs.models.base_model import open_tokenizer
from rayjobs.train.engine import Engine, adapted_model
from rayjobs.train.estimate import TrainingPlan, estimate, sample_examples

STEPS = 4
"""The first is not counted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--part", choices=("estimate", "measure"), help="one of the two, in this process")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    if args.part:
        run(args)
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for part in ("estimate", "measure"):
        command = [sys.executable, "-m", "benchmarks.cost_estimate", "--part", part, "--config", args.config]
        subprocess.run([*command, *args.overrides], env=environment, check=True)


def run(args: argparse.Namespace) -> None:
    """Print the seconds of a step and the memory, estimated or measured."""
    set_environment(show_library_output=False)
    torch.set_num_threads(1)
    settings = load(Config, args.config, [*args.overrides, "run.name=cost_estimate"])
    inputs, train = check(settings), settings.train
    tokenizer = open_tokenizer(inputs.tokenizer)
    examples = sample_examples(settings.data.sources(), inputs.templates, tokenizer, settings.data.max_length)
    plan = TrainingPlan(
        shape=inputs.checkpoint.config,
        adapter=settings.adapter.build(inputs.checkpoint.config.n_layers, None),
        dtype=settings.base.dtype,
        token_budget=train.token_budget,
        global_batch=train.global_batch,
        workers=1,
        zero_stage=settings.zero.stage,
        threads=1,
        checkpoint_activations=train.checkpoint_activations,
    )
    if args.part == "estimate":
        cost = estimate(plan, examples, "cpu")
        print(f"estimated  {cost.step_s:.2f} s a step  {cost.worker_bytes / 2**30:.2f} GiB")
        return
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    dist.init_process_group("gloo", rank=0, world_size=1)
    base, device = settings.base, torch.device("cpu")
    model = adapted_model(base.path, plan.adapter, dtype=base.dtype, zero=settings.zero, seed=0, device=device)
    model.checkpoint_activations = plan.checkpoint_activations
    engine, rng = Engine(model, settings.zero, settings.optimizer), random.Random(1)
    times = [step_seconds(engine, plan, rng.choices(examples, k=train.global_batch)) for _ in range(STEPS)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"measured   {statistics.fmean(times[1:]):.2f} s a step  {peak:.2f} GiB")


def step_seconds(engine: Engine, plan: TrainingPlan, batch: list) -> float:
    """Make one optimizer step, and return its CPU seconds."""
    began = time.process_time()
    for part in assign_micro_batches([len(example.ids) for example in batch], plan.token_budget, 1)[0]:
        tokens, labels = collate([batch[i].ids for i in part], [batch[i].label_spans for i in part])
        engine.backward(engine.loss(tokens, labels) / 1000)
    engine.step(lr=1e-3)
    return time.process_time() - began


if __name__ == "__main__":
    main()
