"""Tiny LLaMAs, trained from scratch where the demo runs: stand-ins for real ones, in the same files.

Each is `adapter.llama.Llama` at a size that one core trains in seconds. It is saved as any other base, a Hugging Face
folder with its tokenizer, and from then on the jobs know it by its path alone.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from adapter.base_checkpoint import save_llama
from adapter.decoder import Llama, LlamaConfig, RMSNorm
from adapter.tokenizer import Tokenizer
from rayjobs.config import config
from rayjobs.demo import notes, questions


@config
class LlamaStandIn:
    """A LLaMA, and what it reads."""

    reads: Literal["notes", "questions"] = "notes"
    """notes: how to copy a note, and how notes are spelled; questions: how to choose among lettered options."""
    dim: int = Field(default=64, ge=8)
    """Width."""
    n_layers: int = Field(default=4, ge=1)
    """Decoder layers."""
    n_heads: int = Field(default=4, ge=1)
    """Attention heads."""
    vocab_size: int = Field(default=300, ge=200)
    """SentencePiece pieces, at most."""
    steps: int = Field(default=400, ge=1)
    """Optimizer steps."""
    batch: int = Field(default=32, ge=1)
    """Documents per step."""
    lr: float = Field(default=3e-3, gt=0)
    """Peak learning rate."""
    answer_weight: float = Field(default=10, ge=1)
    """How much more counts in the loss what can be told from the text before."""
    init_std: float | None = Field(default=None, gt=0)
    """Of all matrices, times d^-0.5; null leaves PyTorch's own, but for the embedding."""
    seed: int = Field(default=0, ge=0)
    """Of the text and of the initial weights."""


READING: dict[str, tuple[Callable[[int, int], list[notes.Document]], tuple[str, ...]]] = {
    "notes": (notes.documents, ()),
    "questions": (questions.documents, questions.SYMBOLS),
}
"""What is read, from a seed and a count, and what the tokenizer keeps whole."""


def documents(settings: LlamaStandIn) -> list[notes.Document]:
    """All that is read, in order."""
    return READING[settings.reads][0](settings.seed, settings.steps * settings.batch)


def train_llama(settings: LlamaStandIn, folder: Path, device: str) -> Iterator[float]:
    """Next-token prediction over all of the text, once, yielding the loss of every step; at its end the folder holds a
    base like any other."""
    read = documents(settings)
    lines = [" ".join(part for part, _ in document) for document in read[::8]]
    symbols = READING[settings.reads][1]
    (folder / "tokenizer.model").write_bytes(notes.train_tokenizer(lines, settings.vocab_size, symbols))
    tokenizer = Tokenizer(folder)
    model = _untrained(settings, tokenizer.vocab_size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, settings.steps, cycle_momentum=False)
    for step in range(settings.steps):
        batch = read[step * settings.batch : (step + 1) * settings.batch]
        padded = _padded([_encoded(document, settings, tokenizer) for document in batch])
        tokens, weights = (tensor.to(device) for tensor in padded)
        losses = F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()
    save_llama(model, folder)


def _untrained(settings: LlamaStandIn, vocab_size: int) -> Llama:
    shape = LlamaConfig(
        dim=settings.dim,
        n_layers=settings.n_layers,
        n_heads=settings.n_heads,
        n_kv_heads=settings.n_heads,
        hidden_dim=settings.dim * 8 // 3,
        vocab_size=vocab_size,
        max_seq_len=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = Llama(shape)
        model.apply(lambda module: module.reset_parameters() if isinstance(module, RMSNorm) else None)
        nn.init.normal_(model.tok_embeddings.weight, std=settings.dim**-0.5)  # at 0.02 learning stalls
        if settings.init_std is not None:
            for matrix in (parameter for parameter in model.parameters() if parameter.dim() == 2):
                nn.init.normal_(matrix, std=settings.init_std * settings.dim**-0.5)
    return model


def _encoded(document: notes.Document, settings: LlamaStandIn, tokenizer: Tokenizer) -> list[tuple[int, float]]:
    """A document's ids, each with its weight in the loss."""
    row = [(tokenizer.bos_id, 0.0)]
    for part, can_be_told in document:
        weight = settings.answer_weight if can_be_told else 1.0
        row += [(id, weight) for id in tokenizer.encode(part, bos=False, eos=False)]
    return [*row, (tokenizer.eos_id, 1.0)]


def _padded(rows: list[list[tuple[int, float]]]) -> tuple[Tensor, Tensor]:
    """Tokens (B, T), and their weights in the loss, which are nothing for padding."""
    shape = (len(rows), max(map(len, rows)))
    tokens, weights = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    for i, row in enumerate(rows):
        ids, counts = zip(*row, strict=True)
        tokens[i, : len(row)], weights[i, : len(row)] = torch.tensor(ids), torch.tensor(counts)
    return tokens, weights
