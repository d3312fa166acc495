"""Llama 3's `tokenizer.model`: byte pairs by rank, as the library tiktoken reads them.

Each line holds a token's bytes in base64, and its rank, which is also its id. A text is split by a regular expression;
a piece that is a token becomes its id; of any other, the two neighbours whose joined bytes have the lowest rank are
joined, until none can be. `tokenizers` does the same, given the joins, and looking for whole pieces first.
"""

import base64
import hashlib
import itertools
import re
from dataclasses import replace
from pathlib import Path

from adapter.errors import TokenizerError
from adapter.json_object import read_object
from adapter.tokenizers.hugging_face import HuggingFaceTokenizer, build, byte_level
from adapter.tokenizers.settings import AddedToken, TokenizerSettings

_FIRST_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""The regular expression that splits a text into pieces."""

_N_SPECIAL = 256
_FIRST = ("begin_of_text", "end_of_text")
_SPECIAL_3_0 = (*_FIRST, *("",) * 4, "start_header_id", "end_header_id", "", "eot_id")
_SPECIAL_3_1 = (
    *(*_FIRST, "", "", "finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id"),
    *("python_tag", "image"),
)
"""Names of the special tokens from the first on; an empty one is reserved, as are all that follow."""


def is_ranks(content: bytes) -> bool:
    """True for a file in tiktoken's format."""
    return _FIRST_LINE.match(content) is not None


def read_ranks(content: bytes, path: Path, settings: TokenizerSettings) -> HuggingFaceTokenizer:
    """Llama 3's tokenizer. Its special tokens stand in no file: they are those of Llama 3.1 and later.

    Beside a `params.json` that does not scale the rotary embedding they are Llama 3.0's; and where the settings list
    added tokens, those.

    Raises TokenizerError for a file that is malformed or does not hold every byte.
    """
    tokens = _parse(content, path)
    letters = byte_letters()
    texts = ["".join(letters[byte] for byte in token) for token in tokens]
    vocabulary = {text: rank for rank, text in enumerate(texts)}
    merges = _joins(vocabulary)
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", **settings.named}
    ends = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    special = settings.added or _special_tokens(len(tokens), path.parent)
    ids = {token.content: id for id, token in special.items()}
    settings = replace(
        settings,
        named=named,
        added=special,
        stops=settings.stops or frozenset(ids[end] for end in ends if end in ids),
    )
    bos = named["bos_token"]
    values = byte_level(vocabulary, merges, [PATTERN], bos=(bos, ids[bos]) if settings.add_bos and bos in ids else None)
    return build(values, str(path), hashlib.sha256(content).hexdigest(), settings)


def byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies: its own if it can be seen, or one past 255."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    unseen = [byte for byte in range(256) if byte not in seen]
    return [chr(byte if byte in seen else 256 + unseen.index(byte)) for byte in range(256)]


def _parse(content: bytes, path: Path) -> list[bytes]:
    """The tokens by rank."""
    tokens = []
    for number, line in enumerate(content.splitlines()):
        try:
            token, rank = line.split()
            tokens.append(base64.b64decode(token, validate=True))
        except ValueError as error:
            raise TokenizerError(
                f"{path}: line {number + 1} is {line[:40]!r}, not a token in base64 and its rank; the file is damaged"
            ) from error
        if rank != str(number).encode():
            raise TokenizerError(
                f"{path}: line {number + 1} has rank {rank.decode(errors='replace')!r}, not {number}; lines are lost"
            )
    if absent := sorted({bytes([byte]) for byte in range(256)} - set(tokens)):
        raise TokenizerError(f"{path}: has no token for the byte {absent[0]!r}; the file is damaged")
    return tokens


def _joins(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """All ways to join two tokens to a third, by the third's rank."""
    joins = []
    for token, rank in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                joins.append((rank, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(joins)]


def _special_tokens(first_id: int, folder: Path) -> dict[int, AddedToken]:
    """The special tokens of Llama 3.0 or of later ones, by the model's `params.json`."""
    params = folder / "params.json"
    scaled = not params.is_file() or read_object(params, TokenizerError).get("use_scaled_rope")
    names: tuple[str, ...] = _SPECIAL_3_1 if scaled else _SPECIAL_3_0
    reserved = itertools.count()
    names = (*names, *("",) * (_N_SPECIAL - len(names)))
    texts = [f"<|{name or f'reserved_special_token_{next(reserved)}'}|>" for name in names]
    return {first_id + place: AddedToken(content=text) for place, text in enumerate(texts)}
