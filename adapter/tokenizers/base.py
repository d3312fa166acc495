"""The interface of tokenizers: text to ids and back, whatever file one was read from."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from adapter.errors import TokenizerError

MIN_UNUSED_ROWS, UNUSED_ROWS_SHARE = 64, 1 / 32
"""Number of rows that a base may embed beyond the tokens of its tokenizer: see `Tokenizer.check_fits`."""


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """The ids with a meaning of their own, and the texts that chat templates know them by."""

    bos: int | None = None
    """The id that begins a text; None for a tokenizer that begins texts with nothing, as Qwen's."""
    eos: int | None = None
    """The id that ends a text, and that training appends."""
    stops: frozenset[int] = frozenset()
    """All ids that end an answer."""
    pad: int | None = None
    """The id that fills rows; None for a tokenizer that defines none."""
    unk: int | None = None
    """The id of text that the vocabulary cannot spell."""
    texts: dict[str, str] = field(default_factory=dict)
    """Name in a chat template (`bos_token`, `eos_token`, ...) → text."""


class Rendered(NamedTuple):
    """The tokens of a rendered chat template."""

    ids: list[int]
    spans: list[tuple[int, int]]
    """The characters [start, end) of the text that each token stands for."""


class Tokenizer(ABC):
    """Text to ids and back. It pickles with all that it has read, so it can be sent to other hosts.

    Three things that are not words must not be confused:
    - `unk_id` is a real token, for text that the vocabulary cannot spell;
    - `pad_id` is an id that may fill a row up to its batch's length. Many tokenizers define none. It is then `eos_id`,
      which every base embeds; `unk_id` would hide real unknowns. Code must not recognise padding by its id: masks and
      labels say what is padding;
    - `adapter.loss.IGNORE` is a label and never an id.
    """

    def __init__(self, name: str, sha256: str, special: SpecialIds, chat_template: str | None = None) -> None:
        """name: the file, for messages. sha256: SHA-256 of that file's bytes, in hexadecimal."""
        self.name = name
        self.sha256 = sha256
        self.chat_template = chat_template
        """The model's own Jinja template of conversations; None if it has none."""
        self._special = special

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.vocab_size} tokens)"

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The largest id plus one."""

    @property
    def rows_needed(self) -> int:
        """Rows that a base must embed to read any text.

        Special tokens that come after all words and have no role, such as one for images, may go without a row.
        """
        return self.vocab_size

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """The ids of a text in which nothing is special."""

    @abstractmethod
    def _added_tokens(self) -> Sequence[object]:
        """The tokens and settings that do not stand in the tokenizer's own file."""

    @abstractmethod
    def _encode_rendered(self, text: str, verbatim: Sequence[tuple[int, int]]) -> Rendered:
        """See `encode_rendered`."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of ids that are all within the vocabulary."""

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """The ids of a text, with BOS and EOS if wanted. Text that spells a special token stays text.

        A tokenizer without BOS adds none. Raises TokenizerError for what is not a string, for a string that is no text,
        because it holds half of a surrogate pair, and for `eos` of a tokenizer without EOS.
        """
        _check_text(text)
        begin = [self.bos_id] if bos and self.bos_id is not None else []
        return [*begin, *self._encode(text), *([self.eos_id] if eos else [])]

    def encode_rendered(self, text: str, verbatim: Sequence[tuple[int, int]] = ()) -> Rendered:
        """The ids of a rendered chat template, and the characters of each. Nothing is added: the template did.

        Strings of special tokens become their ids, except where they touch a `verbatim` span of characters
        [start, end): those hold what a person wrote, who must not be able to end their turn and begin the model's.

        Raises TokenizerError for a string that is no text.
        """
        _check_text(text)
        return self._encode_rendered(text, verbatim)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Special tokens, and ids past the last token (a base may embed more), have no text.

        Raises TokenizerError for a negative id, such as the label IGNORE.
        """
        ids = [int(i) for i in ids]
        if min(ids, default=0) < 0:
            raise TokenizerError(f"{self.name}: {min(ids)} is no id; was a label or a padding decoded?")
        return self._decode([i for i in ids if i < self.vocab_size])

    def continuation(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """The text by which `new` ids continue the prompt's: the text of all ids, less what the prompt's alone is.

        Decoded alone, new ids may lose the space of their first word, because some tokenizers put one before a text. A
        prompt that ends within a character, spelled in bytes, is taken up to the character before it.
        """
        whole, known = self.decode([*prompt, *new]), self.decode(prompt)
        if not whole.startswith(known):
            known = next(known[:n] for n in range(len(known), -1, -1) if whole.startswith(known[:n]))
        return whole[len(known) :]

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, over all that texts and templates become ids by: the file and its settings."""
        special = self._special
        ids = [special.bos, special.eos, sorted(special.stops), special.pad, special.unk, sorted(special.texts.items())]
        return hashlib.sha256(repr([self.sha256, ids, self.chat_template, self._added_tokens()]).encode()).hexdigest()

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text; None for a tokenizer that begins texts with nothing."""
        return self._special.bos

    @property
    def eos_id(self) -> int:
        """The id that ends a text. Raises TokenizerError if there is none."""
        if self._special.eos is None:
            raise TokenizerError(
                f"{self.name}: defines no EOS token, without which an answer has no end; name one of its tokens as "
                "eos_token in tokenizer_config.json beside it"
            )
        return self._special.eos

    @property
    def eos_ids(self) -> frozenset[int]:
        """All ids that end an answer: the tokenizer's, and those that the model's own configuration names."""
        return self._special.stops | ({self._special.eos} if self._special.eos is not None else set())

    @property
    def unk_id(self) -> int | None:
        """The id of text that the vocabulary cannot spell; None if it can spell everything."""
        return self._special.unk

    @property
    def pad_id(self) -> int:
        """A valid id to fill rows with; see the class."""
        pad, eos = self._special.pad, self._special.eos
        return pad if pad is not None and pad != self.unk_id else eos or 0

    @property
    def special_tokens(self) -> dict[str, str]:
        """The texts of special tokens by their names in chat templates, such as `eos_token`."""
        return dict(self._special.texts)

    def check_fits(self, vocab_size: int) -> None:
        """Raise TokenizerError unless a base that embeds `vocab_size` rows can belong to this tokenizer.

        Its ids must not exceed the rows. Rows without a token are legitimate: vocabularies are padded to a multiple of
        64 or 128 for speed (32,000 → 32,064), of 1,024 to be split over devices (32,000 → 32,768), or grow by a few
        tokens, such as a pad token. More than 64 of them, or a 32nd of the tokens where that is more, is what no
        padding explains: the base was made with another tokenizer, and its outputs would be read as wrong words.
        """
        if self.rows_needed > vocab_size:
            raise TokenizerError(
                f"{self.name}: has {self.rows_needed} tokens, the base's vocabulary only {vocab_size}; "
                "use the tokenizer that came with the base"
            )
        if vocab_size - self.vocab_size > max(MIN_UNUSED_ROWS, self.vocab_size * UNUSED_ROWS_SHARE):
            raise TokenizerError(
                f"{self.name}: has only {self.vocab_size} tokens, the base's vocabulary {vocab_size}: more than "
                "padding explains; use the tokenizer that came with the base"
            )


def find_special(special: Iterable[str], text: str, verbatim: Sequence[tuple[int, int]] = ()) -> list[tuple[int, int]]:
    """The spans of special tokens' texts, the longest where several begin, that touch no verbatim span."""
    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
    found, start = [], 0
    spans = sorted((low, high) for low, high in verbatim if low < high)
    for low, high in [*spans, (len(text), len(text))]:
        found += [match.span() for match in pattern.finditer(text, start, max(low, start))]
        start = max(start, high)
    return found


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"a text is a string, got {text!r:.60}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{text[error.start]!r} at character {error.start + 1} is half of a surrogate pair, which is no text"
        ) from error
