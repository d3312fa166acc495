"""Measure the speed of generation in tokens per second, against transformers and against the time to read the weights.

SmolLM2-135M-Instruct goes on with prompts of 8 to 71 tokens, greedily, in batches. All of these take turns in one
process, in rounds:

    ours           this library as `adapter-generate` runs it, with prepacked weights, in fp32, bf16 and int8
    in rows        this library with weights as they are loaded
    transformers   its `generate` with a dynamic cache and SDPA, padded on the left
    floor          one product with each weight for one token, no more: by torch in rows, and prepacked

A figure is the time of 1 + N new tokens less that of 1, so that it leaves out the reading of the prompts.

    python -m benchmarks.decoding [--batches 1 8 32] [--tokens 24] [--rounds 3] [--cpu-time] [--json]

Figures are medians over rounds. --cpu-time counts processor seconds on one thread, for a machine that others use too.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from adapter.base.checkpoint import load_decoder
from adapter.base.quantization import PRECISIONS, Int8Linear
from adapter.decoder import Decoder
from adapter.engine.prepacking import FewRowsInt8Linear, PrepackedHead, PrepackedLinear, prepack_weights
from adapter.generate import generate
from adapter.linear import Linear
from rayjobs.reporting.tables import markdown_table
from tests.real_models import smollm2

SHORTEST, LONGEST = 8, 71
PRECISION_NAMES = ("fp32", "bf16", "int8")

Contestant = Callable[[list[list[int]], int], list[list[int]]]
"""(prompts, new tokens) → the new tokens of each prompt."""


def make_prompts(batch: int, vocab_size: int) -> list[list[int]]:
    """Prompts of random tokens, of evenly spaced lengths; a batch of one has the mean length."""
    lengths = torch.linspace(SHORTEST, LONGEST, batch + 2)[1:-1].round().int().tolist()
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (length,), generator=rng).tolist() for length in lengths]


def ours(name: str, *, prepacked: bool) -> tuple[Decoder, Contestant]:
    """Load the model in a precision, and return it with what generates by it."""
    dtype, quantization = PRECISIONS[name]
    model = load_decoder(smollm2(), dtype=dtype, quantization=quantization)
    if prepacked and not prepack_weights(model):
        raise SystemExit("this machine's torch cannot prepack weights")
    return model, lambda prompts, n: generate(model, prompts, eos_ids=(), temperature=0, max_new_tokens=n)


def peers(name: str) -> Contestant:
    """Generation by transformers, in one precision."""
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=PRECISIONS[name].dtype).eval()

    def run(prompts: list[list[int]], n: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        length = {"min_new_tokens": n, "max_new_tokens": n}
        given = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, **given, **length)[:, width:].tolist()

    return run


def products(model: Decoder) -> list[tuple[torch.nn.Module, torch.Tensor]]:
    """Every linear layer with one token's input."""
    dtype, kinds = model.tok_embeddings.weight.dtype, Linear | PrepackedLinear | Int8Linear | FewRowsInt8Linear
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    inputs = [torch.randn(1, layer.in_features, dtype=dtype) for layer in layers]
    return [*zip(layers, inputs, strict=True), (model.output, torch.randn(1, model.config.dim, dtype=dtype))]


def n_bytes(model: Decoder) -> int:
    """Bytes of the weights that a token is multiplied by."""
    total = 0
    for layer, _ in products(model):
        n_weights = layer.in_features * layer.out_features if not isinstance(layer, PrepackedHead) else None
        if n_weights is None or isinstance(layer, torch.nn.Linear):
            total += layer.weight.nbytes
        else:
            total += n_weights * (1 if isinstance(layer, Int8Linear) else model.tok_embeddings.weight.element_size())
    return total


class Clock:
    """Seconds of a call, of wall or of processor."""

    def __init__(self, cpu_time: bool) -> None:
        self.read = time.process_time if cpu_time else time.perf_counter

    def __call__(self, call: Callable[[], Any]) -> float:
        start = self.read()
        call()
        return self.read() - start


def measure(batches: Sequence[int], n_tokens: int, rounds: int, clock: Clock) -> dict[str, Any]:
    """Return seconds per step of each contestant at each batch size, and of the floors."""
    contestants: dict[str, Contestant] = {}
    floors: dict[str, list[tuple[torch.nn.Module, torch.Tensor]]] = {}
    size: dict[str, int] = {}
    for name in PRECISION_NAMES:
        model, contestants[f"ours {name}"] = ours(name, prepacked=True)
        floors[f"prepacked {name}"], size[name] = products(model), n_bytes(model)
        vocab_size = model.config.vocab_size
        if name != "int8":
            model, contestants[f"ours {name}, in rows"] = ours(name, prepacked=False)
            floors[f"in rows {name}"] = products(model)
            contestants[f"transformers {name}"] = peers(name)
    times: dict[str, list[float]] = {}
    for number in range(rounds + 1):  # the first warms up
        for name, layers in floors.items():
            spent = clock(lambda layers=layers: [layer(x) for layer, x in layers])
            times.setdefault(f"floor {name}", []).append(spent)
        for batch in batches:
            prompts = make_prompts(batch, vocab_size)
            for name, run in contestants.items():
                both = [clock(lambda run=run, n=n: run(prompts, n)) for n in (1, 1 + n_tokens)]  # noqa: B023
                times.setdefault(f"{name} x{batch}", []).append((both[1] - both[0]) / n_tokens)
        print(f"round {number} of {rounds}", flush=True)
    answers = {name: contestants[name](make_prompts(2, vocab_size), 16) for name in ("ours fp32", "transformers fp32")}
    equal = sum(a == b for x, y in zip(*answers.values(), strict=True) for a, b in zip(x, y, strict=True))
    seconds = {name: statistics.median(spent[1:]) for name, spent in times.items()}
    return {"seconds": seconds, "bytes": size, "equal_tokens_of_32": equal}


def table(result: dict[str, Any], batches: Sequence[int]) -> str:
    """Return tokens/s of everyone at every batch size, in Markdown."""
    seconds = result["seconds"]
    rows = []
    for name in dict.fromkeys(key.rsplit(" x", 1)[0] for key in seconds if " x" in key):
        rates = [batch / seconds[f"{name} x{batch}"] for batch in batches]
        peer = f"transformers {'bf16' if 'fp32' not in name else 'fp32'}"
        ratios = [rate * seconds[f"{peer} x{batch}"] / batch for rate, batch in zip(rates, batches, strict=True)]
        rows.append([name, *(f"{rate:.1f} ({ratio:.2f})" for rate, ratio in zip(rates, ratios, strict=True))])
    for name, size in result["bytes"].items():
        for layout in ("in rows", "prepacked"):
            if spent := seconds.get(f"floor {layout} {name}"):
                cell = f"{1 / spent:.1f}: {size / spent / 1e9:.1f} GB/s"
                if alone := seconds.get(f"ours {name} x1"):
                    cell += f"; ours reaches {spent / alone:.0%}"
                rows.append([f"floor {name}, {layout}", cell, *[""] * (len(batches) - 1)])
    return markdown_table(["tokens/s (times transformers)", *(f"batch {batch}" for batch in batches)], rows)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="sequences in a batch")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens that are counted (default: 24)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that are counted (default: 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all cores)")
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds, with one thread")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    given = parser.parse_args()
    torch.set_num_threads(1 if given.cpu_time else given.threads)
    warnings.filterwarnings("ignore")
    result = measure(given.batches, given.tokens, given.rounds, Clock(given.cpu_time))
    print(table(result, given.batches))
    print(f"{result['equal_tokens_of_32']} of 32 greedy tokens are transformers'")
    if given.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
