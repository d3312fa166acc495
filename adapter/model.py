"""The short public face: a frozen base, its tokenizer, and at most one adapter at a time.

base = AdaptedModel.from_pretrained("llama-7b")
base.load_adapter("adapter.safetensors")
print(base.ask("Give three tips for staying healthy."))
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapter.adapter_checkpoint import adapter_from, attach_file, read_adapter
from adapter.adaption import AdaptionConfig, Gate
from adapter.base_checkpoint import load_llama, open_checkpoint
from adapter.decoder import Llama
from adapter.errors import AdapterError
from adapter.generate import generate
from adapter.instruct import ALPACA, Example, PromptTemplate
from adapter.loss import IGNORE
from adapter.tokenizer import Tokenizer


class AdaptedModel:
    """A frozen decoder that can be adapted, asked, and told apart from others by its fingerprint."""

    def __init__(self, model: Llama, tokenizer: Tokenizer, *, fingerprint: str | None = None) -> None:
        """Raises TokenizerError if the tokenizer has pieces that the model does not embed."""
        tokenizer.check_fits(model.config.vocab_size)
        self.model = model
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        tokenizer: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "AdaptedModel":
        """Loads a folder in Meta's or Hugging Face's format; its `tokenizer.model` unless another is given.

        Raises CheckpointError or TokenizerError, both ValueErrors, before any weight is read.
        """
        checkpoint = open_checkpoint(path)
        words = Tokenizer(tokenizer or checkpoint.tokenizer_path or checkpoint.path)
        words.check_fits(checkpoint.config.vocab_size)
        model = load_llama(checkpoint, dtype=dtype, device=device)
        return cls(model, words, fingerprint=checkpoint.fingerprint)

    def add_adapter(self, config: AdaptionConfig, *, seed: int = 0) -> None:
        """Puts a fresh adapter on the base; with its gates at zero it changes nothing until it is trained."""
        device = self.model.tok_embeddings.weight.device
        self.model.attach(config, torch.Generator(device).manual_seed(seed))

    def load_adapter(self, path: str | Path, *, gate: Gate | None = None, encoder: str | None = None) -> None:
        """Loads an adapter file of any known form; `gate` is an official v1 file's convention (see `read_adapter`).

        encoder: the identity of the encoder whose features it will be given. Raises CheckpointError if it was made for
        another base, tokenizer or encoder.
        """
        file = read_adapter(path, gate=gate)
        known = {"fingerprint": self.fingerprint, "tokenizer_sha256": self.tokenizer.sha256, "encoder": encoder}
        attach_file(self.model, file, **known)

    def save_adapter(self, path: str | Path, *, extra: Mapping[str, Any] | None = None) -> None:
        """Writes the adapter alone, marked with this base and tokenizer."""
        adapter_from(
            self.model, base_fingerprint=self.fingerprint, tokenizer_sha256=self.tokenizer.sha256, extra=extra
        ).save(path)

    @torch.no_grad()
    def logits(self, texts: Sequence[str], *, images: Sequence[Tensor | None] | None = None) -> list[Tensor]:
        """Each text's next-token logits (T, V) after BOS and each of its T - 1 pieces, in the model's dtype.

        images: each text's features (F,) from the adapter's encoder, or None where it has none.
        """
        rows = [self.tokenizer.encode(text, bos=True, eos=False) for text in texts]
        if not rows:
            return []
        width = max(map(len, rows))
        limit = self.model.config.max_seq_len
        if width > limit:
            raise AdapterError(f"a text of {width} tokens does not fit the base's window of {limit}")
        pad = self.tokenizer.pad_id  # on the right, where causal attention keeps it from every real token
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        seen = None if images is None else self.model.images(images)
        logits = self.model(ids.to(self.model.tok_embeddings.weight.device), images=seen)
        return [row_logits[: len(row)] for row_logits, row in zip(logits, rows, strict=True)]

    def ask(
        self,
        instruction: str,
        input: str = "",
        *,
        image: Tensor | None = None,
        template: PromptTemplate = ALPACA,
        max_new_tokens: int = 256,
        temperature: float = 0.1,
        top_p: float = 0.75,
        seed: int = 0,
    ) -> str:
        """Answers one instruction, put into the words that adapters are trained on. Temperature 0 is greedy.

        image: features (F,) from the adapter's encoder.
        """
        (answer,) = self.generate(
            [template.render(instruction, input)],
            images=[image],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        return answer.strip()  # the tokenizer puts a space before the first word

    def generate(
        self,
        prompts: Sequence[str],
        *,
        images: Sequence[Tensor | None] | None = None,
        max_new_tokens: int,
        temperature: float = 0.1,
        top_p: float = 0.75,
        seed: int = 0,
    ) -> list[str]:
        """Continues each prompt until EOS or `max_new_tokens`; only the new text. Temperature 0 is greedy.

        images: each prompt's features (F,) from the adapter's encoder, or None where it has none.
        """
        ids = [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
        return self.continue_ids(
            ids, images=images, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        )

    def continue_ids(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        images: Sequence[Tensor | None] | None = None,
        max_new_tokens: int,
        temperature: float = 0.1,
        top_p: float = 0.75,
        seed: int = 0,
    ) -> list[str]:
        """As `generate`, for prompts that are ids already, BOS included."""
        new = generate(
            self.model,
            prompts,
            eos_id=self.tokenizer.eos_id,
            images=images,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        return [self.tokenizer.decode(row) for row in new]

    @torch.no_grad()
    def losses(self, examples: Sequence[Example], *, images: Sequence[Tensor | None] | None = None) -> list[float]:
        """Each example's cross-entropy, summed over its labels: how unlikely its output is after its prompt."""
        if not examples:
            return []
        tokens = torch.zeros(len(examples), max(len(example.ids) for example in examples), dtype=torch.int64)
        labels = torch.full_like(tokens, IGNORE)
        for row, example in enumerate(examples):
            ids, start = torch.tensor(example.ids), example.label_start
            tokens[row, : len(ids)], labels[row, start : len(ids)] = ids, ids[start:]
        device = self.model.tok_embeddings.weight.device
        hidden = self.model.hidden(tokens.to(device), images=None if images is None else self.model.images(images))
        labels = labels.to(device)
        return [self.model.output(hidden[i : i + 1], labels[i : i + 1]).item() for i in range(len(examples))]
