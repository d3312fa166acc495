"""Measure how time grows with sizes, each over a 16-fold range: a training step of the adapter, and CaFo's search.

    python -m benchmarks.growth [--rounds 3] [--json]

One size varies at a time, on tiny models with random weights and random unit features. The sizes of a row take turns,
and a time is the shortest of the rounds, in processor seconds on one thread. The exponent e of time ~ size^e is fitted
to all sizes by least squares of the logarithms; that of the last doubling stands beside it, since a fixed cost hides
the growth of small sizes.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from adapter.adaption import AdaptionConfig
from adapter.base.binding import meta_decoder
from adapter.decoder import Decoder
from adapter.decoder_config import DecoderConfig
from benchmarks.cafo_search import Scale, as_held_out, make
from cafo.search import search
from cafo.search_grid import BetaGrid
from rayjobs.reporting.tables import markdown_table

LAYERS = 16
DECODER = DecoderConfig(
    dim=128, n_layers=LAYERS, n_heads=4, n_kv_heads=4, hidden_dim=344, vocab_size=997, max_seq_len=2048
)


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The time of something at several sizes."""

    name: str
    sizes: tuple[int, ...]
    make: Callable[[int], Callable[[], object]]
    """size → what is timed"""


def training_step(*, length: int = 128, batch: int = 4, adapted: int = 14, prompts: int = 10) -> Callable[[], object]:
    """Return forward, backward and AdamW of a step; every second token is labelled."""
    model = _decoder()
    model.add_adapter(AdaptionConfig(n_layers=adapted, prompt_length=prompts), torch.Generator().manual_seed(0))
    for adaption in model.adaptions:
        torch.nn.init.constant_(adaption.gate, 0.01)
    optimizer = torch.optim.AdamW([parameter for _, parameter in model.adapter_parameters()], lr=1e-4)
    tokens = torch.randint(3, DECODER.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(length) % 2 == 1, tokens, -100)

    def step() -> None:
        model(tokens, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _decoder() -> Decoder:
    model = meta_decoder(DECODER).to_empty(device="cpu")
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05, generator=rng) if parameter.dim() == 2 else parameter.fill_(1.0)
    return model.requires_grad_(False)


def choice(*, classes: int = 50, keys: int = 16, images: int = 1000) -> Callable[[], object]:
    """Return the exact search for α and β on random features."""
    scale = Scale(classes=classes, keys_per_class=keys, images=images, required_ratio=0)
    held_out = as_held_out(*make(scale, seed=0))
    return lambda: search(held_out, grid=BetaGrid())


def doublings(first: int) -> tuple[int, ...]:
    """Return five sizes, each twice the one before."""
    return tuple(first << i for i in range(5))


GROWTHS = (
    Growth(name="step: tokens of a sequence", sizes=doublings(64), make=lambda n: training_step(length=n)),
    Growth(name="step: sequences", sizes=doublings(2), make=lambda n: training_step(batch=n)),
    Growth(name="step: adapted layers of 16", sizes=doublings(1), make=lambda n: training_step(adapted=n)),
    Growth(name="step: prompts of a layer, K", sizes=doublings(8), make=lambda n: training_step(prompts=n)),
    Growth(name="search: keys of a class", sizes=doublings(8), make=lambda n: choice(keys=n)),
    Growth(name="search: classes", sizes=doublings(25), make=lambda n: choice(classes=n)),
    Growth(name="search: images", sizes=doublings(250), make=lambda n: choice(images=n)),
)


def measure(growth: Growth, rounds: int) -> list[float]:
    """Return the processor seconds at each size, the shortest of the rounds after one that warms up."""
    calls = [growth.make(size) for size in growth.sizes]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, taken in zip(calls, times, strict=True):
            start = time.process_time()
            call()
            taken.append(time.process_time() - start)
    return [min(taken[1:]) for taken in times]


def exponent(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """Return e of seconds ~ size^e, by least squares of the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(taken) for taken in seconds]
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="times that each size is measured (default: 3)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows, figures = [], {}
    for growth in GROWTHS:
        seconds = measure(growth, given.rounds)
        fitted, last = exponent(growth.sizes, seconds), exponent(growth.sizes[-2:], seconds[-2:])
        sizes = f"{growth.sizes[0]:,} to {growth.sizes[-1]:,}"
        rows.append([growth.name, sizes, f"{seconds[0]:.3g} to {seconds[-1]:.3g} s", f"{fitted:.2f}", f"{last:.2f}"])
        figures[growth.name] = {"sizes": growth.sizes, "seconds": seconds, "exponent": fitted, "last_doubling": last}
        print("; ".join(rows[-1]), flush=True)
    print(markdown_table(["what grows", "sizes", "time", "exponent", "last doubling"], rows))
    if given.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
