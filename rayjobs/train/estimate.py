"""Estimate the memory and the time of a training run, before it and without the base's weights.

A probe trains decoders of the base's width, with random weights and few layers, for about two seconds on this machine.
The cost of a layer is the difference between two of them. With L layers, of which A are adapted, a token costs

    one adapted layer and all that is not a layer + (L - A) · frozen layer + (A - 1) · adapted layer

A layer counts as adapted if it needs gradients; where only some of these have prompts, all count as if they had.
"""

import itertools
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from adapter.base.binding import meta_decoder
from adapter.base.memory import base_bytes
from adapter.base.quantization import PRECISIONS
from adapter.batching import collate
from adapter.decoder import Decoder
from adapter.decoder_config import DecoderConfig
from adapter.errors import RecordError
from adapter.loss import CHUNK_ROWS, IGNORE
from adapter.methods.base import AdapterMethod
from adapter.packing import pack
from adapter.records.encoding import encode_record, encode_text
from adapter.records.example import Example, count_labels
from adapter.templates import Template
from adapter.tokenizers.base import Tokenizer
from rayjobs.data.records import Source
from rayjobs.data.sampler import assign_micro_batches
from rayjobs.models.base_model import Dtype
from rayjobs.storage.hub_model import format_bytes

PROBE_S = 2.0
"""Time to spend on training steps."""
PROBE_LAYERS = 8
PROBE_PARAMETERS = 300_000_000
"""Size of the largest probe's layers, of which there are at least two and at most `PROBE_LAYERS`."""
MIN_ROUNDS, MAX_ROUNDS = 3, 10
"""Times that each probe is measured; the shortest counts."""
FIRST_TOKENS = 64
"""Tokens of the first, untimed pass, by which the others are sized."""
SAMPLE = 256
"""Records of each source whose lengths are read."""
BYTES_PER_TRAINABLE = 20
"""float32: the parameter, its gradient, AdamW's two moments, and ZeRO's own copy of the parameter."""
LOGIT_COPIES = 3
"""float32 tensors of a chunk of logits that exist at a time."""
PROGRAM_BYTES = 900 * 2**20
"""Memory of a worker without a model: PyTorch, Ray and DeepSpeed."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The settings and the shape that the cost of a run depends on."""

    shape: DecoderConfig
    adapter: AdapterMethod
    dtype: Dtype
    token_budget: int
    global_batch: int
    workers: int
    zero_stage: int
    threads: int | None
    """PyTorch's threads of a worker; None shares the cores of this machine among the workers"""
    checkpoint_activations: bool


class Estimate(NamedTuple):
    """The cost of a run on workers such as this machine would have."""

    base_bytes: int
    """the frozen weights that a worker holds"""
    training_bytes: int
    """adapter, gradients, optimizer state, and the activations of the largest micro-batch"""
    step_s: float
    validation_s_per_token: float

    @property
    def worker_bytes(self) -> int:
        return PROGRAM_BYTES + self.base_bytes + self.training_bytes


def describe_cost(
    plan: TrainingPlan, examples: Sequence[Example], steps: int, device: str, *, images: bool
) -> list[list[str]]:
    """Rows of a plan about the memory of a worker and the time of all steps.

    images: whether images are encoded besides, which is not estimated.
    """
    cost = estimate(plan, examples, device)
    parts = f"{format_bytes(cost.base_bytes)} of base, {format_bytes(cost.training_bytes)} of training"
    where = "this machine's GPU" if device == "cuda" else "idle cores like this machine's"
    workers = f"{plan.workers} worker{'s' * (plan.workers > 1)} on {where}"
    besides = ", besides encoding images" if images else ""
    time = f"about {_describe_duration(steps * cost.step_s)} for {workers}, {cost.step_s:.2g} s each{besides}"
    if PRECISIONS[plan.dtype].quantization:
        time = f"not known for a base in {plan.dtype}"
    return [
        ["memory of a worker", f"about {format_bytes(cost.worker_bytes)}: {parts}"],
        ["time of the steps", time],
    ]


def _describe_duration(seconds: float) -> str:
    """Two digits of seconds, minutes, hours or days."""
    for unit, size, limit in (("s", 1, 99.5), ("min", 60, 99.5), ("h", 3600, 48)):
        if seconds / size < limit:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / 86400:.2g} days"


def sample_examples(
    sources: Sequence[Source], templates: Sequence[Template], tokenizer: Tokenizer, max_length: int
) -> list[Example]:
    """Encode the first records of each source; records that cannot be used are left out."""
    examples = []
    for source, template in zip(sources, templates, strict=True):
        for record in itertools.islice((row for row in source.read() if "rejected" not in row), SAMPLE):
            try:
                if "text" in record:
                    examples += encode_text(record, tokenizer, max_length=max_length)
                else:
                    examples.append(encode_record(record, tokenizer, template, max_length=max_length))
            except RecordError:
                continue
    return examples


def estimate(plan: TrainingPlan, examples: Sequence[Example], device: str) -> Estimate:
    """Estimate the cost of a run whose records are like these examples, which are at least one."""
    whole, world = meta_decoder(plan.shape, plan.adapter), plan.workers
    trainable = sum(parameter.numel() for parameter in whole.parameters() if parameter.requires_grad)
    frozen = base_bytes(plan.shape, *PRECISIONS[plan.dtype]) // (world if plan.zero_stage == 3 else 1)
    if plan.adapter.trains_base:
        frozen = 0
    step = _mean_step(plan, examples)
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(plan.threads or max(1, (os.cpu_count() or 1) // world))
    try:
        cost = _probe(plan, step, device)
    finally:
        torch.set_num_threads(threads)
    longest = max(len(example.ids) for example in examples)
    tokens = max(longest, min(plan.token_budget, 2 * step.tokens))  # of the largest micro-batch
    rows = step.labelled * tokens
    logits = LOGIT_COPIES * 4 * plan.shape.vocab_size * (rows if plan.adapter.trains_base else min(CHUNK_ROWS, rows))
    activations = round(cost.saved_bytes * tokens + logits)
    return Estimate(
        base_bytes=frozen,
        training_bytes=trainable * BYTES_PER_TRAINABLE + activations,
        step_s=cost.train_s * step.tokens,
        validation_s_per_token=cost.forward_s,
    )


class _Step(NamedTuple):
    """The work of one worker in one step, on average."""

    tokens: float
    """that are computed: a prefix that records share counts once, and neither padding nor the last label does"""
    rows: float
    """of a micro-batch"""
    width: float
    """computed tokens of a row"""
    labelled: float
    """labels per computed token"""


def _mean_step(plan: TrainingPlan, examples: Sequence[Example], draws: int = 16) -> _Step:
    """Draw steps of the examples, divide them as the workers do, and count what is computed."""
    rng, micro_batches, labels, tokens, rows = random.Random(0), 0, 0, 0, 0
    for _ in range(draws):
        batch = rng.choices(examples, k=plan.global_batch)
        labels += sum(count_labels(example.label_spans) for example in batch)
        lengths = [len(example.ids) for example in batch]
        for of_worker in assign_micro_batches(lengths, plan.token_budget, plan.workers):
            for part in filter(None, of_worker):
                padded = collate([batch[i].ids for i in part], [batch[i].label_spans for i in part])
                drawn_before = [i for i in range(len(part)) if any(batch[part[i]] is batch[part[j]] for j in range(i))]
                tokens += len(pack(*padded, alone=torch.tensor(drawn_before, dtype=torch.int64)).tokens)
                rows += len(part)
                micro_batches += 1
    return _Step(tokens / draws / plan.workers, rows / micro_batches, tokens / rows, labels / tokens)


class _Cost(NamedTuple):
    """The cost of one token."""

    train_s: float
    forward_s: float
    saved_bytes: float


def _probe(plan: TrainingPlan, step: _Step, device: str) -> _Cost:
    """Add up what one layer and a few of each kind cost."""
    layers = plan.shape.n_layers
    adapted = layers - plan.adapter.first_layer(layers)
    one_layer = meta_decoder(replace(plan.shape, n_layers=1, sliding_layers=frozenset()))
    layer_size = sum(parameter.numel() for parameter in one_layer.layers.parameters())
    some = max(2, min(PROBE_LAYERS, PROBE_PARAMETERS // layer_size))
    single, several = (_random_decoder(plan, count, device) for count in (1, some))
    probes = {"one": (single, 1), "frozen": (several, 1), "adapted": (several, some)}

    def micro_batch(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(plan.shape.vocab_size, (rows, width), device=device)
        labels = tokens.clone()
        labels[:, : max(1, width - round(step.labelled * width))] = IGNORE
        return tokens, labels

    tokens, labels = micro_batch(1, min(round(step.width), FIRST_TOKENS))
    saved = {
        name: _saved_bytes(*_adapt(plan, probe), tokens, labels) / tokens.numel() for name, probe in probes.items()
    }
    round_s = sum(_time_probes(plan, probes, tokens, labels, device).values())
    affordable = max(FIRST_TOKENS // 2, int(tokens.numel() * PROBE_S / MIN_ROUNDS / round_s))
    width = max(2, min(round(step.width), affordable))
    tokens, labels = micro_batch(max(1, min(round(step.rows), affordable // width)), width)
    rounds: list[dict[str, float]] = []
    end = time.monotonic() + PROBE_S
    while len(rounds) < MIN_ROUNDS or (len(rounds) < MAX_ROUNDS and time.monotonic() < end):
        rounds.append(_time_probes(plan, probes, tokens, labels, device))
    times = {name: min(one[name] for one in rounds) / tokens.numel() for name in rounds[0]}

    def total(of: dict[str, float], first: str, frozen: str, trained: str) -> float:
        per_frozen, per_adapted = ((of[name] - of[first]) / (some - 1) for name in (frozen, trained))
        return of[first] + (layers - adapted) * max(0.0, per_frozen) + (adapted - 1) * max(0.0, per_adapted)

    return _Cost(
        total(times, "one", "frozen", "adapted"),
        total(times, "forward one", "forward several", "forward several"),
        total(saved, "one", "frozen", "adapted"),
    )


def _random_decoder(plan: TrainingPlan, layers: int, device: str) -> Decoder:
    """A decoder of the base's width with so many layers, none of which has a sliding window."""
    shape = replace(plan.shape, n_layers=layers, sliding_layers=frozenset(), sliding_window=None)
    model = meta_decoder(shape).to(PRECISIONS[plan.dtype].dtype).to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.tie()
    model.checkpoint_activations = plan.checkpoint_activations
    return model


def _adapt(plan: TrainingPlan, probe: tuple[Decoder, int]) -> tuple[Decoder]:
    model, adapted = probe
    if model.adapter != (adapter := plan.adapter.on_top(adapted)):
        model.add_adapter(adapter)
    return (model,)


def _time_probes(
    plan: TrainingPlan, probes: dict[str, tuple[Decoder, int]], tokens: torch.Tensor, labels: torch.Tensor, device: str
) -> dict[str, float]:
    """Seconds of a forward and backward pass of each probe, and of a forward pass of one layer and of several."""
    times = {}
    for name, probe in probes.items():
        (model,) = _adapt(plan, probe)
        times[name] = _time(lambda: model(tokens, labels).backward(), device)  # noqa: B023
        if name != "adapted":
            with torch.no_grad():
                shown = {"one": "forward one", "frozen": "forward several"}[name]
                times[shown] = _time(lambda: model(tokens, labels), device)  # noqa: B023
    return times


def _saved_bytes(model: Decoder, tokens: torch.Tensor, labels: torch.Tensor) -> int:
    """Bytes that a micro-batch saves for its backward pass, without the model's own parameters."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, labels).backward()
    return sum(sizes.values())


def _time(work: Callable[[], object], device: str) -> float:
    """Seconds of a GPU, or of cores that do nothing else: programs that share them now may have ended by the run."""
    if device == "cpu":
        began = time.process_time()
        work()
        return (time.process_time() - began) / torch.get_num_threads()
    began = time.monotonic()
    work()
    torch.cuda.synchronize()
    return time.monotonic() - began
