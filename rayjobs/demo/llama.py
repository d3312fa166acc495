"""Tiny LLaMAs, trained from scratch where the demo runs.

Each is `adapter.decoder.Decoder` at a size that one core trains in seconds, saved in Hugging Face's format with its
tokenizer. The demo's jobs read it as they read any other base.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter.base.checkpoint import save_decoder
from adapter.decoder import Decoder, RMSNorm
from adapter.decoder_config import DecoderConfig
from adapter.tokenizers.base import Tokenizer
from adapter.tokenizers.load import load_tokenizer
from rayjobs.demo import notes, questions
from rayjobs.demo.config import TinyLlamaConfig
from rayjobs.demo.optim import train_steps

TEXTS: dict[str, tuple[Callable[[int, int], list[notes.Document]], tuple[str, ...]]] = {
    "notes": (notes.documents, ()),
    "questions": (questions.documents, questions.SYMBOLS),
}
"""For each training text: a function of seed and count that makes its documents, and the tokenizer's own symbols."""


def training_documents(settings: TinyLlamaConfig) -> list[notes.Document]:
    """The documents of all steps, in order."""
    return TEXTS[settings.reads][0](settings.seed, settings.steps * settings.batch)


def train_llama(settings: TinyLlamaConfig, folder: Path, device: str) -> Iterator[float]:
    """Train by next-token prediction, in one pass; yield the loss of every step, then write the folder."""
    documents = training_documents(settings)
    lines = [" ".join(part for part, _ in document) for document in documents[::8]]
    symbols = TEXTS[settings.reads][1]
    (folder / "tokenizer.model").write_bytes(notes.train_tokenizer(lines, settings.vocab_size, symbols))
    tokenizer = load_tokenizer(folder)
    model = _untrained(settings, tokenizer.vocab_size).to(device)

    def loss_of_step(step: int) -> Tensor:
        batch = documents[step * settings.batch : (step + 1) * settings.batch]
        padded = _padded([_encode(document, settings, tokenizer) for document in batch])
        tokens, weights = (tensor.to(device) for tensor in padded)
        losses = F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")
        return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()

    yield from train_steps(
        model, loss_of_step, steps=settings.steps, peak_lr=settings.lr, weight_decay=0.01, betas=(0.9, 0.95)
    )
    save_decoder(model, folder)


def _untrained(settings: TinyLlamaConfig, vocab_size: int) -> Decoder:
    shape = DecoderConfig(
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
        model = Decoder(shape)
        model.apply(lambda module: module.reset_parameters() if isinstance(module, RMSNorm) else None)
        nn.init.normal_(model.tok_embeddings.weight, std=settings.dim**-0.5)  # at 0.02 learning stalls
        if settings.init_std is not None:
            for matrix in (parameter for parameter in model.parameters() if parameter.dim() == 2):
                nn.init.normal_(matrix, std=settings.init_std * settings.dim**-0.5)
    return model


def _encode(document: notes.Document, settings: TinyLlamaConfig, tokenizer: Tokenizer) -> list[tuple[int, float]]:
    """A document's ids with their loss weights."""
    row = [(id, 0.0) for id in tokenizer.encode("", bos=True, eos=False)]
    for part, predictable in document:
        weight = settings.answer_weight if predictable else 1.0
        row += [(id, weight) for id in tokenizer.encode(part, bos=False, eos=False)]
    return [*row, (tokenizer.eos_id, 1.0)]


def _padded(rows: list[list[tuple[int, float]]]) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) and their loss weights, which are 0 for padding."""
    shape = (len(rows), max(map(len, rows)))
    tokens, weights = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    for i, row in enumerate(rows):
        ids, counts = zip(*row, strict=True)
        tokens[i, : len(row)], weights[i, : len(row)] = torch.tensor(ids), torch.tensor(counts)
    return tokens, weights
