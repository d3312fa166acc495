"""The part of `benchmarks.gpu` that trains: a plain loop on a 7B model, and our DeepSpeed engine beside it."""

import os
import random
import statistics
import tempfile
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from adapter.batching import collate
from adapter.decoder import Decoder
from adapter.micro_batches import micro_batches
from adapter.packing import pack
from adapter.records.encoding import encode_record
from adapter.records.example import Example
from adapter.records.reader import read_records
from adapter.tokenizers.load import load_tokenizer
from benchmarks.gpu_setup import ROUNDS, Figures, Sizes, add_adapter, random_decoder, seconds_of

PAPER_RECORDS, PAPER_EPOCHS = 52_002, 5


def make_records(sizes: Sizes, count: int, data: str | None, tokenizer_path: str | None) -> list[Example]:
    """Return records to train on: encoded ones of a file, or random tokens with lengths like those of Alpaca.

    Without a file, a record has 44 tokens that all share, a question of lognormal length (median 14, σ 0.6), and an
    answer of lognormal length (median 45, σ 0.95), 512 tokens at most: on average 130, of which 53% are labelled.
    """
    rng = random.Random(0)
    if data:
        assert tokenizer_path, "records need a tokenizer"
        tokenizer = load_tokenizer(tokenizer_path)
        records = list(read_records(data))
        chosen = rng.sample(records, min(count, len(records)))
        return [encode_record(record, tokenizer, max_length=512) for record in chosen]
    vocabulary = sizes.decoder.vocab_size
    shared = [rng.randrange(3, vocabulary) for _ in range(44)]
    examples = []
    for _ in range(count):
        prompt = len(shared) + max(1, round(rng.lognormvariate(2.64, 0.6)))
        length = min(512, prompt + max(1, round(rng.lognormvariate(3.81, 0.95))))
        ids = [*shared, *(rng.randrange(3, vocabulary) for _ in range(length - len(shared)))]
        examples.append(Example(ids=ids, label_spans=[(min(prompt, length - 1), length)]))
    return examples


class Trainer:
    """Training steps of a decoder in a plain loop: micro-batches under a token budget, then AdamW."""

    def __init__(self, model: Decoder, device: str) -> None:
        self.model, self.device = model, device
        trained = [parameter for _, parameter in model.adapter_parameters()]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.02)

    def step(self, batch: Sequence[Example], budget: int) -> None:
        """Make one step."""
        n_labels = sum(example.n_labels for example in batch)
        for tokens, labels in make_parts(batch, budget):
            (self.model(tokens.to(self.device), labels.to(self.device)) / n_labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def make_parts(batch: Sequence[Example], budget: int) -> list[tuple[Tensor, Tensor]]:
    """Return the micro-batches of a step: tokens and labels, each (B, T)."""
    parts = micro_batches([len(example.ids) for example in batch], budget)
    return [collate([batch[i].ids for i in part], [batch[i].label_spans for i in part]) for part in parts]


def train(sizes: Sizes, device: str, precision: str, records: Sequence[Example], with_zero: bool = True) -> Figures:
    """Measure a training step on a base in a precision, and what our DeepSpeed engine adds to it."""
    model = random_decoder(sizes, precision, device)
    add_adapter(model, sizes)
    trainer = Trainer(model, device)
    batches = [records[at : at + sizes.batch] for at in range(0, len(records) - sizes.batch + 1, sizes.batch)]
    tokens = statistics.mean(sum(len(example.ids) for example in batch) for batch in batches)
    rates, memory = {}, {}
    for budget in sizes.token_budgets:
        try:
            rates[budget], memory[budget] = _measure_steps(trainer, batches, budget)
        except torch.OutOfMemoryError:
            trainer.optimizer.zero_grad()
            torch.cuda.empty_cache()
    if not rates:
        raise MemoryError(f"no token budget of {sizes.token_budgets} fits")
    best = max(rates, key=lambda budget: rates[budget])
    with FlopCounterMode(display=False) as counted:
        trainer.step(batches[0], best)
    figures = {
        "records": len(records),
        "tokens_per_record": tokens / sizes.batch,
        "computed_share": _computed_share(batches[0], best),
        "token_budget": best,
        "records_per_s": rates[best],
        "tokens_per_s": rates[best] * tokens / sizes.batch,
        "flops_per_s": counted.get_total_flops() * rates[best] / sizes.batch,
        "peak_bytes": memory[best],
        "by_token_budget": {
            str(budget): {"records_per_s": rate, "peak_bytes": memory[budget]} for budget, rate in rates.items()
        },
        "paper_minutes": PAPER_RECORDS * PAPER_EPOCHS / rates[best] / 60,
    }
    if with_zero:
        figures["zero_overhead"] = _zero_overhead(sizes, trainer, device, batches, best)
    return figures


def _measure_steps(trainer: Trainer, batches: Sequence[Sequence[Example]], budget: int) -> tuple[float, int]:
    """Return records per second, a median over steps, and the most memory that was in use."""
    if trainer.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rates = []
    for number, batch in enumerate([batches[0], *batches][: ROUNDS + 1]):
        taken = seconds_of(lambda batch=batch: trainer.step(batch, budget), trainer.device)
        if number:
            rates.append(len(batch) / taken)
    return statistics.median(rates), torch.cuda.max_memory_allocated() if trainer.device == "cuda" else 0


def _computed_share(batch: Sequence[Example], budget: int) -> float:
    """Return the tokens that a step computes, as a share of the real ones."""
    computed = sum(len(pack(tokens, labels).tokens) for tokens, labels in make_parts(batch, budget))
    return computed / sum(len(example.ids) for example in batch)


def _zero_overhead(
    sizes: Sizes, trainer: Trainer, device: str, batches: Sequence[Sequence[Example]], budget: int
) -> float:
    """Return the time that a step of our engine under ZeRO-2 takes more than the plain loop, as a share of it.

    Both take turns on the same frozen tensors, each with an adapter of its own.
    """
    from rayjobs.train.config import OptimizerConfig, ZeroConfig
    from rayjobs.train.engine import Engine

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": device}
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            model = random_decoder(sizes, "bf16", device, same_as=trainer.model)
            add_adapter(model, sizes)
            engine = Engine(model, ZeroConfig(), OptimizerConfig())

            def step(batch: Sequence[Example]) -> None:
                n_labels = sum(example.n_labels for example in batch)
                for tokens, labels in make_parts(batch, budget):
                    engine.backward(engine.loss(tokens.to(device), labels.to(device)) / n_labels)
                engine.step(1e-4)

            shares = []
            for number, batch in enumerate([batches[0], *batches][: ROUNDS + 1]):
                bare = seconds_of(lambda batch=batch: trainer.step(batch, budget), device)
                ours = seconds_of(lambda batch=batch: step(batch), device)
                if number:
                    shares.append(ours / bare - 1)
            return statistics.median(shares)
        finally:
            dist.destroy_process_group()
