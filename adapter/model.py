"""The library's main class: a frozen base, its tokenizer, and at most one adapter at a time.

    model = AdaptedModel.from_pretrained("llama-7b")
    model.load_adapter("adapter.safetensors")
    print(model.answer("Give three tips for staying healthy."))

T tokens of a text, V vocabulary, F features of an image.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapter.adapter_file import apply_adapter, extract_adapter
from adapter.adapter_formats import read_adapter
from adapter.adaption import Gate
from adapter.base.checkpoint import load_decoder, open_checkpoint
from adapter.base.quantization import Quantization, precision_of
from adapter.batching import collate, pad
from adapter.decoder import Decoder
from adapter.engine.prepacking import prepack_weights
from adapter.errors import AdapterError
from adapter.generate import check_image_count, generate
from adapter.generation_config import GenerationConfig
from adapter.image_projection import Images
from adapter.merge import merge_adapter
from adapter.methods.base import AdapterMethod
from adapter.records.chat_encoding import stop_ids
from adapter.records.encoding import encode_prompt
from adapter.records.example import Example, Record
from adapter.templates import ALPACA, ChatTemplate, Template
from adapter.tokenizers.base import Tokenizer
from adapter.tokenizers.load import load_tokenizer


class AdaptedModel:
    """A frozen decoder with its tokenizer, to which an adapter can be added, loaded and saved.

    `fingerprint` identifies the base by its weights (`Checkpoint.fingerprint`); it is saved with adapters, which are
    then refused on another base. None if it is not known.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, *, fingerprint: str | None = None) -> None:
        """Raises TokenizerError if the tokenizer does not fit the model's vocabulary (`Tokenizer.check_fits`)."""
        tokenizer.check_fits(model.config.vocab_size)
        self.model = model
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.template: Template | None = None
        """The template that the adapter was trained in; None if its file does not say, or there is no adapter."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        tokenizer: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        quantization: Quantization | None = None,
        device: torch.device | str = "cpu",
    ) -> "AdaptedModel":
        """Load a folder in Meta's or Hugging Face's format, or a GGUF file.

        tokenizer: file or folder of another tokenizer; the base's own by default (see `load_tokenizer`). dtype:
        precision of the frozen weights; the adapter is always float32. quantization: hold the linear layers of the
        blocks in 8 or 4 bits (`int8`, `nf4`), for which bfloat16 is the usual dtype of the rest.

        Raises CheckpointError or TokenizerError, before any weight is read, for files that are missing, damaged, or do
        not fit together; CheckpointError for a weight that is NaN or infinite; AdapterError if the library that
        quantizes is missing.
        """
        checkpoint = open_checkpoint(path)
        pieces = load_tokenizer(tokenizer or checkpoint.tokenizer_path or checkpoint.path)
        pieces.check_fits(checkpoint.config.vocab_size)
        model = load_decoder(checkpoint, dtype=dtype, quantization=quantization, device=device)
        return cls(model, pieces, fingerprint=checkpoint.fingerprint())

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return self.model.tok_embeddings.weight.device

    def add_adapter(self, config: AdapterMethod, *, seed: int = 0) -> None:
        """Add a freshly initialised adapter of any method, in place of any that is there.

        It does not change the model's outputs until it is trained, but for the ablations rand_init and prefix. seed: of
        its random values. Raises AdapterError if the base has fewer layers than the adapter, or is held in a precision
        that the method cannot train.
        """
        config.check_precision(precision_of(self.model))
        self.model.add_adapter(config, torch.Generator(self.device).manual_seed(seed))
        self.template = None

    def load_adapter(self, path: str | Path, *, gate: Gate | None = None, encoder: str | None = None) -> None:
        """Load an adapter file of any known format, in place of any adapter that is there.

        gate: the gate convention of an official v1 file, which does not state it (see `read_adapter`).
        encoder: identity of the image encoder whose features the adapter will be given; not compared if None.

        Raises CheckpointError if the file cannot be read, or if the adapter was made for another base, tokenizer or
        image encoder.
        """
        file = read_adapter(path, gate=gate)
        apply_adapter(
            self.model,
            file,
            fingerprint=self.fingerprint,
            tokenizer_sha256=self.tokenizer.sha256,
            encoder=encoder,
        )
        self.template = file.template

    def remove_adapter(self) -> None:
        """Take the adapter off, if there is one: the outputs are then the base's, to the bit.

        Raises AdapterError after full fine-tuning, which leaves nothing to go back to.
        """
        self.model.remove_adapter()
        self.template = None

    def merge_adapter(self) -> None:
        """Fold the adapter into the base, which then computes the same without it, up to rounding; see `adapter.merge`.

        `save_decoder(model.model, folder)` then writes a plain checkpoint. The base has new values, so that its
        `fingerprint` is no longer known. Raises AdapterError for prompts, and for a quantized base.
        """
        merge_adapter(self.model)
        self.fingerprint = None

    def prepack_weights(self) -> bool:
        """Lay out the base's weights for generation, which is then about twice as fast on a CPU; False if it cannot be.

        The outputs are the same up to rounding (see `adapter.engine.prepacking`). The base is no longer trained, merged
        with an adapter, or saved; adapters other than full fine-tuning can still be exchanged.
        """
        return prepack_weights(self.model)

    def save_adapter(self, path: str | Path, *, extra: Mapping[str, Any] | None = None) -> None:
        """Save the adapter alone, with its template and the identities of this base and tokenizer.

        extra: notes to save in the file's header, as JSON values. Raises AdapterError if there is no adapter.
        """
        file = extract_adapter(
            self.model,
            base_fingerprint=self.fingerprint,
            tokenizer_sha256=self.tokenizer.sha256,
            template=self.template,
            extra=extra,
        )
        file.save(path)

    @torch.no_grad()
    def logits(self, texts: str | Sequence[str], *, images: Sequence[Tensor | None] | None = None) -> list[Tensor]:
        """Next-token logits (T, V) of each text, in the model's dtype: after BOS and after each of its T - 1 pieces.

        texts: one string counts as a list of one. images: each text's image features (F,), or None where it has none.

        Raises AdapterError for a text that does not fit the base's window, and for features that the adapter cannot
        read.
        """
        sequences = self._encode(texts)
        if not sequences:
            return []
        self._check_window(sequences)
        batch_images = self._batch_images(images, len(sequences))
        logits = self.model(pad(sequences).to(self.device), images=batch_images)
        return [row[: len(sequence)] for row, sequence in zip(logits, sequences, strict=True)]

    def answer(
        self,
        instruction: str,
        input: str = "",
        config: GenerationConfig | None = None,
        *,
        image: Tensor | None = None,
        template: Template | None = None,
        **overrides: Any,
    ) -> str:
        """Answer one instruction, which is put into the template that the adapter was trained in.

        input: the text that the instruction refers to, if any. image: the features (F,) of its image, if any.
        template: another template; by default the adapter's, or Alpaca's. config, overrides: as in `generate`.

        Raises RecordError for an instruction that leaves no room for an answer in the base's window.
        """
        record = {"instruction": instruction, "input": input}
        return self.answer_records([record], config, images=[image], template=template, **overrides)[0]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        config: GenerationConfig | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        image: Tensor | None = None,
        template: Template | None = None,
        **overrides: Any,
    ) -> str:
        """Answer a conversation: messages {role, content}, the last of them the user's or a tool's.

        It loses its oldest turns where it leaves no room for `max_new_tokens` in the base's window. tools: JSON schemas
        of functions, for chat templates. template: by default the adapter's; of a base without an adapter its own chat
        template; otherwise Alpaca's, with later turns. image, config, overrides: as in `answer`.

        Raises RecordError for a conversation that the template refuses, or whose last question fills the window.
        """
        own = self.tokenizer.chat_template
        if template is None and self.model.adapter is None and own is not None:
            template = ChatTemplate(source=own)
        record: dict[str, Any] = {"messages": messages, "tools": tools}
        return self.answer_records([record], config, images=[image], template=template, **overrides)[0]

    def answer_records(
        self,
        records: Sequence[Record],
        config: GenerationConfig | None = None,
        *,
        images: Sequence[Tensor | None] | None = None,
        template: Template | None = None,
        **overrides: Any,
    ) -> list[str]:
        """Answer records: instructions, conversations or prompts, as `encode_prompt` takes them; see `answer`."""
        config, template = replace(config or GenerationConfig(), **overrides), template or self.template or ALPACA
        window = self.model.config.max_seq_len
        reserve = min(config.max_new_tokens, window // 2)
        prompts = [
            encode_prompt(record, self.tokenizer, template, window=window, reserve=reserve).ids for record in records
        ]
        stops = stop_ids(template, self.tokenizer)
        # An answer begins with the space or line break that parts it from the prompt.
        return [text.strip() for text in self.generate_from_ids(prompts, config, images=images, eos_ids=stops)]

    def generate(
        self,
        prompts: str | Sequence[str],
        config: GenerationConfig | None = None,
        *,
        images: Sequence[Tensor | None] | None = None,
        **overrides: Any,
    ) -> list[str]:
        """Continue each prompt. Returns the new texts only, which begin with a space where a new word begins.

        A prompt and its new text, joined, are the text of all their tokens. (LLaMA's tokenizer keeps every character
        of a prompt; one that normalises texts may not.)

        prompts: one string counts as a list of one, and the result is then a list of one, as in transformers'
        pipelines. config: sampling settings; those of `GenerationConfig()` if None. overrides: single fields of it,
        such as `max_new_tokens=64`, `temperature=0`. images: each prompt's image features (F,), or None where it has
        no image.

        Raises AdapterError for a prompt that is longer than the base's window, and for settings out of range.
        """
        return self.generate_from_ids(self._encode(prompts), config, images=images, **overrides)

    def generate_from_ids(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig | None = None,
        *,
        images: Sequence[Tensor | None] | None = None,
        eos_ids: Collection[int] | None = None,
        **overrides: Any,
    ) -> list[str]:
        """Continue prompts that are token ids already, BOS included; otherwise as `generate`.

        eos_ids: the ids that end an answer; those of the tokenizer if None.
        """
        stops = self.tokenizer.eos_ids if eos_ids is None else eos_ids
        new_ids = generate(self.model, prompts, config, eos_ids=stops, images=images, **overrides)
        return [self.tokenizer.continuation(prompt, new) for prompt, new in zip(prompts, new_ids, strict=True)]

    @torch.no_grad()
    def losses(self, examples: Sequence[Example], *, images: Sequence[Tensor | None] | None = None) -> list[float]:
        """Each example's cross-entropy in nats, summed over its labels: -log p(output | prompt).

        images: each example's image features (F,), or None where it has no image. Raises AdapterError for what is not
        a list of examples, and for an example that is longer than the base's window.
        """
        if not isinstance(examples, Sequence) or not all(isinstance(example, Example) for example in examples):
            raise AdapterError(
                f"losses are of a list of `Example`, as `encode_record` makes them, got {examples!r:.60}"
            )
        if not examples:
            return []
        self._check_window([example.ids for example in examples])
        tokens, labels = collate([example.ids for example in examples], [example.label_spans for example in examples])
        batch_images = self._batch_images(images, len(examples))
        return self.model.losses(tokens, labels, batch_images).tolist()

    def _encode(self, texts: str | Sequence[str]) -> list[list[int]]:
        """The ids of each text, after BOS. A string is one text, not a list of letters."""
        return [
            self.tokenizer.encode(text, bos=True, eos=False) for text in ([texts] if isinstance(texts, str) else texts)
        ]

    def _check_window(self, sequences: Sequence[Sequence[int]]) -> None:
        longest, window = max(map(len, sequences)), self.model.config.max_seq_len
        if longest > window:
            raise AdapterError(f"a text of {longest} tokens does not fit the base's window of {window}: shorten it")

    def _batch_images(self, images: Sequence[Tensor | None] | None, n_rows: int) -> Images | None:
        """The images of a batch of `n_rows` on the model's device. Raises AdapterError for another number of images."""
        check_image_count(images, n_rows)
        return None if images is None else self.model.batch_images(images)
