"""What the parts of `benchmarks.gpu` share: sizes, clocks, and decoders whose random weights are made on the device.

Sizes are in bytes, times in seconds, rates per second.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from adapter.adaption import AdaptionConfig
from adapter.base.binding import meta_decoder
from adapter.base.quantization import PRECISIONS, reading_dtype, set_weight
from adapter.decoder import Decoder
from adapter.decoder_config import DecoderConfig
from benchmarks.cafo_search import Scale
from benchmarks.scaling import LLAMA_7B
from cafo.encoder_spec import EncoderSpec

ROUNDS = 5
"""Times that each thing is measured, after one time that warms up; figures are medians."""

Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of everything that is measured."""

    decoder: DecoderConfig
    adapted: int
    prompt_length: int
    batch: int
    """records in a step"""
    token_budgets: tuple[int, ...]
    """tokens of a micro-batch, tried in turn; the fastest that fits in memory counts"""
    product: tuple[int, ...]
    """sides of square matrix products"""
    copied_bytes: int
    decoding: tuple[int, ...]
    new_tokens: int
    encoder: EncoderSpec
    images: int
    """in a batch of the encoder"""
    search: Scale


SIZES = {
    "7b": Sizes(
        decoder=LLAMA_7B,
        adapted=30,
        prompt_length=10,
        batch=64,
        token_budgets=(4096, 8192, 16384),
        product=(4096, 8192),
        copied_bytes=4 << 30,
        decoding=(1, 64),
        new_tokens=32,
        encoder=EncoderSpec(kind="clip", name="ViT-B-16", weights="random:0"),
        images=256,
        search=Scale(classes=1000, keys_per_class=24, images=10_000, required_ratio=0),
    ),
    "tiny": Sizes(
        decoder=DecoderConfig(dim=24, n_layers=3, n_heads=6, n_kv_heads=3, hidden_dim=41, vocab_size=97),
        adapted=2,
        prompt_length=3,
        batch=4,
        token_budgets=(512,),
        product=(64,),
        copied_bytes=1 << 16,
        decoding=(1, 3),
        new_tokens=3,
        encoder=EncoderSpec(kind="timm", name="test_vit", weights="random:0"),
        images=1,
        search=Scale(classes=5, keys_per_class=3, images=40, required_ratio=0),
    ),
}


def timed(call: Callable[[], object], device: str, rounds: int = ROUNDS) -> float:
    """Return the median seconds of a call, which is made once before."""
    times = [seconds_of(call, device) for _ in range(rounds + 1)]
    return statistics.median(times[1:])


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Return the seconds of a call, until the device has done everything."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: str) -> None:
    """Wait until the device has done everything."""
    if device == "cuda":
        torch.cuda.synchronize()


def random_decoder(sizes: Sizes, precision: str, device: str, same_as: Decoder | None = None) -> Decoder:
    """Return a decoder with random weights, made on the device, in a precision; or with the tensors of another one."""
    model, held = meta_decoder(sizes.decoder), PRECISIONS[precision]
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        if same_as is not None:
            value = same_as.get_parameter(name).detach()
        else:
            value = torch.ones(parameter.shape, device=device, dtype=reading_dtype(model, name, held))
            if value.dim() == 2:
                value.normal_(std=0.02, generator=generator)
        set_weight(model, name, value, held)
    model.tie()
    return model


def add_adapter(model: Decoder, sizes: Sizes) -> None:
    """Add LLaMA-Adapter with gates that are not zero, so that its prompts have gradients."""
    config = AdaptionConfig(n_layers=sizes.adapted, prompt_length=sizes.prompt_length)
    model.add_adapter(config, torch.Generator().manual_seed(0))
    for adaption in model.adaptions:
        torch.nn.init.constant_(adaption.gate, 0.01)
