"""Measure what a frozen base in bf16, int8 or nf4 costs and saves against fp32: loss, memory and speed.

    loss       held-out loss of the base without an adapter, in nats per labelled token
    weights    bytes of the weights, which `adapter.base.memory.base_bytes` also computes
    resident   growth of the process's resident memory when the base is loaded (on a GPU, of its allocated memory)
    forward    tokens per second of the loss without gradients
    step       tokens per second of a training step: forward, backward and AdamW on an adapter of all layers but the
               lowest two, K = 10
    cosine     of the adapter's gradient in the first step with that under fp32

    python -m benchmarks.base_memory --base SmolLM2-135M-Instruct --data alpaca_data.json --json

All bases are loaded side by side, and measured in turn on the same batches of real records, so that the ratios do not
depend on what else the machine does for long. Speeds are medians over batches. Weights that were 4-bit numbers before,
as those of a converted GGUF file, lose less or more under nf4 than others would.
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapter.adaption import AdaptionConfig
from adapter.base.checkpoint import load_decoder, open_checkpoint
from adapter.base.quantization import PRECISIONS
from adapter.base.tensor_files import trim_heap
from adapter.batching import collate
from adapter.decoder import Decoder
from adapter.micro_batches import micro_batches
from adapter.records.encoding import encode_record
from adapter.records.example import Example
from adapter.records.reader import read_records
from adapter.tokenizers.load import load_tokenizer

Batch = tuple[Tensor, Tensor, int]
"""Tokens and labels, each (B, T), and the number of tokens without padding."""


def held_out(base: str, data: str, n_records: int, token_budget: int) -> list[Batch]:
    """Return the file's last records as micro-batches."""
    tokenizer = load_tokenizer(base)
    records = [record for record in read_records(data) if "rejected" not in record][-n_records:]
    examples: list[Example] = [encode_record(record, tokenizer, max_length=512) for record in records]
    batches = []
    for part in micro_batches([len(example.ids) for example in examples], token_budget):
        chosen = [examples[i] for i in part]
        tokens, labels = collate([example.ids for example in chosen], [example.label_spans for example in chosen])
        batches.append((tokens, labels, sum(len(example.ids) for example in chosen)))
    return batches


def memory(device: str) -> int:
    """Return the bytes in use: allocated on a GPU, else resident in this process."""
    gc.collect()
    if device != "cpu":
        return torch.cuda.memory_allocated()
    trim_heap()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def seconds(function: Callable[[], object], device: str) -> float:
    """Return how long a call takes, on a GPU until it is done."""
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Held:
    """A base under one precision, with an adapter in training, and what was measured of it."""

    def __init__(self, base: str, name: str, device: str) -> None:
        dtype, quantization = PRECISIONS[name]
        before = memory(device)
        self.model: Decoder = load_decoder(base, dtype=dtype, quantization=quantization, device=device)
        self.resident = memory(device) - before
        self.weights = sum(tensor.nbytes for tensor in [*self.model.parameters(), *self.model.buffers()])
        self.device = device
        self.loss_sum, self.n_labels = 0.0, 0
        self.forward: list[float] = []
        self.step: list[float] = []

    def measure_forward(self, batch: Batch) -> None:
        """Add a batch to the held-out loss and to the speed of the forward pass; call it before `add_adapter`."""
        tokens, labels, n_tokens = (x.to(self.device) if isinstance(x, Tensor) else x for x in batch)

        @torch.no_grad()
        def run() -> None:
            self.loss_sum += self.model(tokens, labels).item()

        self.forward.append(n_tokens / seconds(run, self.device))
        self.n_labels += int((labels[:, 1:] >= 0).sum())

    def add_adapter(self) -> None:
        """Add an adapter whose gates are near zero, as early in training, so that the gradient reaches its prompts."""
        config = AdaptionConfig(n_layers=self.model.config.n_layers - 2, prompt_length=10)
        self.model.add_adapter(config, torch.Generator().manual_seed(0))
        for adaption in self.model.adaptions:
            torch.nn.init.constant_(adaption.gate, 0.01)
        self.optimizer = torch.optim.AdamW([p for _, p in self.model.adapter_parameters()], lr=1e-3)

    def gradient(self, batch: Batch) -> Tensor:
        """Return the adapter's whole gradient for a batch, and clear it."""
        self.model(batch[0].to(self.device), batch[1].to(self.device)).backward()
        whole = torch.cat([p.grad.flatten().cpu() for _, p in self.model.adapter_parameters() if p.grad is not None])
        self.optimizer.zero_grad()
        return whole

    def measure_step(self, batch: Batch) -> None:
        """Train on a batch and add it to the speed of a training step."""
        tokens, labels, n_tokens = (x.to(self.device) if isinstance(x, Tensor) else x for x in batch)

        def run() -> None:
            self.model(tokens, labels).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        self.step.append(n_tokens / seconds(run, self.device))


def measure(base: str, batches: Sequence[Batch], device: str, n_steps: int) -> dict[str, dict[str, float]]:
    """Return every figure of every precision."""
    load_decoder(base, dtype=torch.bfloat16, quantization="nf4", device=device)  # what loading imports and maps once
    held = {name: Held(base, name, device) for name in PRECISIONS}
    for number, batch in enumerate([batches[0], *batches]):
        for one in held.values():
            one.measure_forward(batch)
            if number == 0:  # the first pass warms up
                one.loss_sum, one.n_labels, one.forward = 0.0, 0, []
    for one in held.values():
        one.add_adapter()
    gradients = {name: one.gradient(batches[0]) for name, one in held.items()}
    for batch in list(batches)[:n_steps]:
        for one in held.values():
            one.measure_step(batch)
    return {
        name: {
            "loss": one.loss_sum / one.n_labels,
            "weights_bytes": one.weights,
            "resident_bytes": one.resident,
            "forward_tokens_per_s": statistics.median(one.forward),
            "step_tokens_per_s": statistics.median(one.step),
            "gradient_cosine": F.cosine_similarity(gradients[name], gradients["fp32"], dim=0).item(),
        }
        for name, one in held.items()
    }


def table(figures: dict[str, dict[str, float]]) -> str:
    """Return the figures as a table, sizes and speeds as ratios to fp32."""
    first = figures["fp32"]
    lines = ["| base | held-out loss | weights | resident | forward | training step | cosine of gradients |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, row in figures.items():
        ratios = [
            f"{row[key] / first[key]:.2f} ×"
            for key in ("weights_bytes", "resident_bytes", "forward_tokens_per_s", "step_tokens_per_s")
        ]
        lines.append(f"| {name} | {row['loss']:.4f} | {' | '.join(ratios)} | {row['gradient_cosine']:.4f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder of the base and its tokenizer")
    parser.add_argument("--data", required=True, help="instruction records; the last ones are held out")
    parser.add_argument("--records", type=int, default=200, help="records that the loss and the speeds are measured on")
    parser.add_argument("--steps", type=int, default=10, help="training steps")
    parser.add_argument("--token-budget", type=int, default=2048, help="tokens of a micro-batch, padding included")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of PyTorch; its own choice by default")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON too")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    batches = held_out(args.base, args.data, args.records, args.token_budget)
    figures = measure(args.base, batches, args.device, args.steps)
    print(table(figures))
    if args.json:
        shown: dict[str, Any] = {
            "device": args.device,
            "threads": torch.get_num_threads(),
            "records": args.records,
            "layers": open_checkpoint(args.base).config.n_layers,
            "figures": figures,
        }
        print(json.dumps(shown))


if __name__ == "__main__":
    main()
