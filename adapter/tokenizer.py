"""LLaMA's SentencePiece tokenizer."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from adapter.errors import TokenizerError
from adapter.file_kind import check_content

_JSON_ONLY = (
    "{}: a Hugging Face fast tokenizer, which a later release will read; this one needs the SentencePiece "
    "tokenizer.model that belongs to the same weights: put it into the folder, or name it"
)
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
"""The first line of Llama 3's `tokenizer.model`: a token in base64 and its rank."""

MIN_UNUSED_ROWS, UNUSED_ROWS_SHARE = 64, 1 / 32
"""Number of rows that a base may embed beyond the pieces of its tokenizer: see `Tokenizer.check_fits`."""


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
        check_content(path, TokenizerError)
        if _TIKTOKEN.match(proto):
            raise TokenizerError(
                f"{path}: Llama 3's tokenizer, in tiktoken's format, which a later release will read; this one needs a "
                "SentencePiece model, as LLaMA 1 and 2 have"
            )
        self._open(proto, str(path))

    def _open(self, proto: bytes, name: str) -> None:
        self._proto = proto
        self._name = name
        self._processor = SentencePieceProcessor()
        if not proto:
            raise TokenizerError(f"{name}: the file is empty; LLaMA's tokenizer is a SentencePiece model")
        try:
            self._processor.LoadFromSerializedProto(proto)
        except RuntimeError as error:
            raise TokenizerError(
                f"{name}: not a SentencePiece model, truncated or corrupt; LLaMA's is called tokenizer.model"
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
        """The ids of a text, with BOS and EOS if wanted. Text that spells a control piece stays text.

        Raises TokenizerError for what is not a string, and for a string that is no text, because it holds half of a
        surrogate pair.
        """
        if not isinstance(text, str):
            raise TokenizerError(f"a text is a string, got {text!r:.60}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"{text[error.start]!r} at character {error.start + 1} is half of a surrogate pair, which is no text"
            ) from error
        return [self.bos_id] * bos + self._processor.encode(text, out_type=int) + [self.eos_id] * eos

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Control pieces, and ids past the last piece (a base may embed more), have no text.

        Raises TokenizerError for a negative id, such as the label IGNORE.
        """
        ids = [int(i) for i in ids]
        if min(ids, default=0) < 0:
            raise TokenizerError(f"{self._name}: {min(ids)} is no id; was a label or a padding decoded?")
        return self._processor.decode([i for i in ids if i < self.vocab_size])

    def continuation(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """The text by which `new` ids continue the prompt's: the text of all ids, less what the prompt's alone is.

        Decoded alone, new ids would lose the space of their first word, because a tokenizer puts one before a text. A
        prompt that ends within a character, spelled in bytes, is taken up to the character before it.
        """
        whole, known = self.decode([*prompt, *new]), self.decode(prompt)
        if not whole.startswith(known):
            known = next(known[:n] for n in range(len(known), -1, -1) if whole.startswith(known[:n]))
        return whole[len(known) :]

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
        """Raise TokenizerError unless a base that embeds `vocab_size` rows can belong to this tokenizer.

        Its ids must not exceed the rows. Rows without a piece are legitimate: vocabularies are padded to a multiple of
        64 or 128 for speed (32,000 → 32,064), of 1,024 to be split over devices (32,000 → 32,768), or grow by a few
        tokens, such as a pad token. More than 64 of them, or a 32nd of the pieces where that is more, is what no
        padding explains: the base was made with another tokenizer, and its outputs would be read as wrong words.
        """
        if self.vocab_size > vocab_size:
            raise TokenizerError(
                f"{self._name}: has {self.vocab_size} pieces, the base's vocabulary only {vocab_size}; "
                "use the tokenizer.model that came with the base"
            )
        if vocab_size - self.vocab_size > max(MIN_UNUSED_ROWS, self.vocab_size * UNUSED_ROWS_SHARE):
            raise TokenizerError(
                f"{self._name}: has only {self.vocab_size} pieces, the base's vocabulary {vocab_size}: more than "
                "padding explains; use the tokenizer.model that came with the base"
            )
