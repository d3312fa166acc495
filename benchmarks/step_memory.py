"""Measure the peak memory of one training step above the weights, against PEFT's AdaptionPrompt.

    python -m benchmarks.step_memory [--shape smollm2] [--rows 8] [--length 256] [--json]

Forward, backward and AdamW over random rows without a shared prefix, of which the second half is labelled. Each
contestant is a process of its own: it builds its model with random weights, makes a step of one short row, which
allocates what every later step uses again, and then the step that counts. `weights` is its resident memory before that
step less that of a process without a model, `above` what the step adds to it at its peak, as Linux counts resident
pages.

    ours, bf16    this library on a base in float32, in bf16
    checkpointed  ours, with adapted layers recomputed in the backward pass
    peft          PEFT on transformers (SDPA), the whole batch at once
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.adapter_step import SHAPES, make_optimizer, make_our_model, make_peft_model
from rayjobs.reporting.tables import markdown_table

CONTESTANTS = ("ours", "bf16", "checkpointed", "peft")


def resident(key: str = "VmRSS") -> int:
    """Return this process's resident bytes, or with VmHWM the most that there were since `forget_peak`."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Let the peak of resident memory count anew from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def make(name: str, shape: str) -> tuple[torch.nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """Return a contestant's model, and its summed loss of tokens and labels."""
    if name == "peft":
        model = make_peft_model(make_our_model(shape))
        return model, lambda tokens, labels: model(input_ids=tokens, labels=labels, num_items_in_batch=1).loss
    ours = make_our_model(shape, torch.bfloat16 if name == "bf16" else torch.float32)
    ours.checkpoint_activations = name == "checkpointed"
    return ours, ours


def measure(name: str, shape: str, rows: int, length: int) -> dict[str, int]:
    """Return the bytes of the weights and those that a step adds, in this process."""
    empty = resident()
    model, loss_sum = make(name, shape)
    optimizer = make_optimizer(model)

    def step(rows: int, length: int) -> None:
        rng = torch.Generator().manual_seed(0)
        tokens = torch.randint(3, SHAPES[shape][0].vocab_size, (rows, length), generator=rng)
        labels = tokens.clone()
        labels[:, : length // 2] = -100
        (loss_sum(tokens, labels) / labels.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(1, 8)
    before = resident()
    forget_peak()
    step(rows, length)
    return {"weights": before - empty, "above": resident("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2", help="of the base (default: smollm2)")
    parser.add_argument("--rows", type=int, default=8, help="sequences of the step (default: 8)")
    parser.add_argument("--length", type=int, default=256, help="tokens of each (default: 256)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.contestant:
        print(json.dumps(measure(given.contestant, given.shape, given.rows, given.length)))
        return
    figures = {}
    for name in CONTESTANTS:
        words = ["--shape", given.shape, "--rows", str(given.rows), "--length", str(given.length)]
        command = [sys.executable, "-m", "benchmarks.step_memory", "--contestant", name, *words]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        figures[name] = json.loads(done.stdout.splitlines()[-1])
    most = figures["peft"]["above"]
    rows = [
        [name, *(f"{one[key] / 1e9:.2f} GB" for key in ("weights", "above")), f"{one['above'] / most:.0%}"]
        for name, one in figures.items()
    ]
    print(markdown_table(["", "weights", "above", "of PEFT's"], rows))
    if given.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
