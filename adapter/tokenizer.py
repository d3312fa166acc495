"""LLaMA's SentencePiece tokenizer."""

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from adapter.errors import TokenizerError

_JSON_ONLY = "{}: a Hugging Face fast tokenizer; a SentencePiece tokenizer.model is needed, as in Meta's folders"


class Tokenizer:
    """A SentencePiece model: text to ids and back. It pickles as the model's bytes, so it can be sent to other hosts.

    Three things that are not words must not be confused:
    - `unk_id` is a real piece, for text that the vocabulary cannot spell;
    - `pad_id` is an id that may fill a row up to its batch's length. LLaMA's tokenizers define none (SentencePiece
      returns -1, which indexes nothing). It is then `eos_id`, which every base embeds; `unk_id` would hide real
      unknowns. Code must not recognise padding by its id: masks and labels say what is padding;
    - `adapter.loss.IGNORE` is a label and never an id.
    """

    def __init__(self, path: str | Path) -> None:
        """Load a `.model` file, or `tokenizer.model` from a folder.

        Raises TokenizerError for a file that is missing, corrupt, or no SentencePiece model.
        """
        path = Path(path)
        if path.is_dir():
            if not (path / "tokenizer.model").is_file() and (path / "tokenizer.json").is_file():
                raise TokenizerError(_JSON_ONLY.format(path / "tokenizer.json"))
            path = path / "tokenizer.model"
        if path.suffix == ".json":
            raise TokenizerError(_JSON_ONLY.format(path))
        try:
            proto = path.read_bytes()
        except OSError as error:
            raise TokenizerError(f"{path}: no tokenizer can be read there ({error.strerror})") from error
        self._open(proto, str(path))

    def _open(self, proto: bytes, name: str) -> None:
        self._proto = proto
        self._name = name
        self._processor = SentencePieceProcessor()
        try:
            if not proto:
                raise RuntimeError("it is empty")
            self._processor.LoadFromSerializedProto(proto)
        except RuntimeError as error:
            raise TokenizerError(
                f"{name}: not a SentencePiece model, truncated or corrupt; LLaMA's is called tokenizer.model ({error})"
            ) from error
        for kind, piece in (("BOS", self.bos_id), ("EOS", self.eos_id)):
            if piece < 0:
                raise TokenizerError(f"{name}: defines no {kind} piece, which instruction tuning needs")

    def __getstate__(self) -> tuple[bytes, str]:
        return self._proto, self._name

    def __setstate__(self, state: tuple[bytes, str]) -> None:
        self._open(*state)

    def __repr__(self) -> str:
        return f"Tokenizer({self._name!r}, {self.vocab_size} pieces)"

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """The ids of a text, with BOS and EOS if wanted. Text that spells a control piece stays text."""
        return [self.bos_id] * bos + self._processor.encode(text, out_type=int) + [self.eos_id] * eos

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Control pieces, and ids past the last piece (a base may embed more), have no text.

        Raises TokenizerError for a negative id, such as the label IGNORE.
        """
        ids = [int(i) for i in ids]
        if min(ids, default=0) < 0:
            raise TokenizerError(f"{self._name}: {min(ids)} is no id; was a label or a padding decoded?")
        return self._processor.decode([i for i in ids if i < self.vocab_size])

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self._processor.vocab_size()

    @property
    def bos_id(self) -> int:
        return self._processor.bos_id()

    @property
    def eos_id(self) -> int:
        return self._processor.eos_id()

    @property
    def unk_id(self) -> int:
        return self._processor.unk_id()

    @property
    def pad_id(self) -> int:
        """A valid id to fill rows with; see the class."""
        pad = self._processor.pad_id()
        return pad if pad >= 0 and pad != self.unk_id else self.eos_id

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the model file's bytes, in hexadecimal."""
        return hashlib.sha256(self._proto).hexdigest()

    def check_fits(self, vocab_size: int) -> None:
        """Raise TokenizerError if ids could exceed a base's embedding of `vocab_size` rows."""
        if self.vocab_size > vocab_size:
            raise TokenizerError(
                f"{self._name}: has {self.vocab_size} pieces, the base's vocabulary only {vocab_size}; "
                "use the tokenizer.model that came with the base"
            )
