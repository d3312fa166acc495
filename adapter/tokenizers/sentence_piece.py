"""SentencePiece models, as LLaMA 1 and 2, Mistral and Gemma have: `tokenizer.model`."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from sentencepiece import SentencePieceProcessor

from adapter.errors import TokenizerError
from adapter.tokenizers.base import Rendered, SpecialIds, Tokenizer, find_special
from adapter.tokenizers.settings import TokenizerSettings

_WITHOUT_PREFIX = b"\x1a\x02\x18\x00"
"""`normalizer_spec { add_dummy_prefix: false }` in protobuf. Appended to a model, it overrides that field."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, with the tokens that were added to it, if any."""

    def __init__(
        self,
        proto: bytes,
        name: str,
        *,
        special: SpecialIds | None = None,
        added: dict[str, int] | None = None,
        chat_template: str | None = None,
        prefix_after_special: bool = True,
    ) -> None:
        """proto: the file's bytes. name: the file, for messages.

        special: ids with a meaning; the model's own if None. added: tokens beyond the model's pieces, all special.
        prefix_after_special: put a space before each text after a special token, as LLaMA's code does, and not only
        before the first ("legacy" in Hugging Face's words).

        Raises TokenizerError for a file that is empty, corrupt, or no SentencePiece model.
        """
        self._processor = _open(proto, name)
        self._proto, self._added, self._prefix_after_special = proto, dict(added or {}), prefix_after_special
        sha256 = hashlib.sha256(proto).hexdigest()
        super().__init__(name, sha256, special or special_pieces(self._processor), chat_template)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_processor", "_prefixless", "_special_ids")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._processor = _open(self._proto, self.name)

    @property
    def vocab_size(self) -> int:
        return max(self._processor.vocab_size(), *(id + 1 for id in self._added.values()), 0)

    def _encode(self, text: str) -> list[int]:
        return self._processor.encode(text, out_type=int)

    def _added_tokens(self) -> Sequence[object]:
        return [*sorted(self._added.items()), self._prefix_after_special]

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode([i for i in ids if i < self._processor.vocab_size()])

    def _encode_rendered(self, text: str, verbatim: Sequence[tuple[int, int]]) -> Rendered:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        start = 0
        for low, high in [*find_special(self._special_ids, text, verbatim), (len(text), len(text))]:
            processor = self._processor if start == 0 or self._prefix_after_special else self._prefixless
            plain = processor.encode(text[start:low], return_type="offset_mapping")
            ids += plain["ids"]
            spans += [(start + a, start + b) for a, b in plain["offsets"]]
            if low < high:
                ids.append(self._special_ids[text[low:high]])
                spans.append((low, high))
            start = high
        return Rendered(ids, spans)

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        own = range(self._processor.vocab_size())
        control = {self._processor.id_to_piece(i): i for i in own if self._processor.IsControl(i) or i == self.unk_id}
        return {**control, **self._added}

    @cached_property
    def _prefixless(self) -> SentencePieceProcessor:
        """The same model, which puts no space before a text."""
        return _open(self._proto + _WITHOUT_PREFIX, self.name)


def read_sentence_piece(content: bytes, name: str, settings: TokenizerSettings) -> SentencePieceTokenizer:
    """A SentencePiece model with what the settings of its folder add. Raises TokenizerError if it is none."""
    processor = _open(content, name)
    added = {token.content: id for id, token in settings.added.items()}
    ids = {processor.id_to_piece(id): id for id in range(processor.vocab_size())} | added
    settings = replace(settings, named=special_pieces(processor).texts | settings.named)
    bos = ids.get(settings.named.get("bos_token", "")) if settings.add_bos else None
    return SentencePieceTokenizer(
        content,
        name,
        special=settings.special_ids(ids.get, bos=bos),
        added=added,
        chat_template=settings.chat_template,
        prefix_after_special=settings.legacy,
    )


def special_pieces(processor: SentencePieceProcessor) -> SpecialIds:
    """The special ids that a SentencePiece model itself defines; it says -1 for those that it has not."""
    ids = {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id(), "unk": processor.unk_id()}
    known: dict[str, Any] = {name: id for name, id in ids.items() if id >= 0}
    return SpecialIds(**known, texts={f"{name}_token": processor.id_to_piece(id) for name, id in known.items()})


def _open(proto: bytes, name: str) -> SentencePieceProcessor:
    if not proto:
        raise TokenizerError(f"{name}: the file is empty; LLaMA's tokenizer is a SentencePiece model")
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(proto)
    except (RuntimeError, UnicodeDecodeError) as error:  # the latter of a message that quotes the damage
        raise TokenizerError(
            f"{name}: not a SentencePiece model, truncated or corrupt; LLaMA's is called tokenizer.model"
        ) from error
    return processor
