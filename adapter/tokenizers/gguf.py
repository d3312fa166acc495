"""Tokenizers in the metadata of GGUF files, which name their kind and list their tokens.

Of SentencePiece models (`llama`) the file has all that counts, so that one is written anew. Of byte pairs (`gpt2`) it
has the tokens and their joins, but of the regular expressions that split a text only a name.
"""

import hashlib
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from adapter.errors import TokenizerError
from adapter.gguf_file import GGUFFile, read_gguf
from adapter.tokenizers.base import Tokenizer
from adapter.tokenizers.hugging_face import build, byte_level
from adapter.tokenizers.sentence_piece import read_sentence_piece
from adapter.tokenizers.settings import AddedToken, TokenizerSettings
from adapter.tokenizers.tiktoken_ranks import PATTERN as LLAMA3

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_CAPITAL, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITAL}*{_SMALL}+|[^\r\n\p{{L}}\p{{N}}]?{_CAPITAL}+{_SMALL}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Splitting:
    """The steps that prepare a text before its bytes are joined."""

    patterns: tuple[str, ...]
    """Regular expressions that split it, one after the other."""
    whole_first: bool = False
    """A piece that is a token is not joined from its bytes."""
    add_bos: bool = False
    """Texts begin with BOS unless the file says otherwise."""
    normalizer: str | None = None
    """A Unicode normal form. llama.cpp leaves it out; the models were trained with it."""


_KINDS = {
    _Splitting((LLAMA3,), whole_first=True, add_bos=True): (
        "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "smaug-bpe",
    ),
    _Splitting((_TEKKEN,), whole_first=True): ("tekken",),
    _Splitting((_QWEN2,), normalizer="NFC"): ("qwen2", "deepseek-r1-qwen", "megrez"),
    _Splitting((r"\p{N}", _GPT2)): ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"),
    _Splitting((_GPT2,)): ("gpt-2", "phi-2", "olmo", "mpt", "jais"),
}  # fmt: skip
_SPLITTINGS = {name: splitting for splitting, names in _KINDS.items() for name in names}
"""`tokenizer.ggml.pre` → what it stands for."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
"""Types of tokens; SentencePiece has the same numbers."""
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")
_STOP_TEXTS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
"""Tokens that end an answer wherever they exist: few files say more than which of them is EOS."""


def read_gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file, with its chat template.

    Raises TokenizerError for a file that is damaged, or whose kind of tokenizer is not supported.
    """
    file = read_gguf(path, TokenizerError)
    kind, tokens = file.require("tokenizer.ggml.model", str), file.require_list("tokenizer.ggml.tokens", str)
    types = file.get_list("tokenizer.ggml.token_type", int) or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise TokenizerError(f"{path}: {len(tokens)} tokens have {len(types)} types; the file is damaged")
    if kind == "llama":
        return read_sentence_piece(
            _sentence_piece_model(file, tokens, types), str(path), _settings(file, tokens, types)
        )
    if kind == "gpt2":
        return _byte_level(file, tokens, types)
    raise TokenizerError(
        f"{path}: tokenizer.ggml.model is {kind!r}; supported are 'llama' (SentencePiece) and 'gpt2' (byte pairs); or "
        "name the tokenizer that the model was converted from"
    )


def _settings(file: GGUFFile, tokens: list[str], types: list[int], *, add_bos: bool = True) -> TokenizerSettings:
    def id_of(key: str) -> int | None:
        id = file.get(f"tokenizer.ggml.{key}", int)
        return id if id is not None and 0 <= id < len(tokens) else None

    roles = {name: id_of(key) for name, key in _ROLES.items()}
    stops = {id for key in _STOPS if (id := id_of(key)) is not None}
    stops |= {id for id, text in enumerate(tokens) if types[id] == _CONTROL and text in _STOP_TEXTS}
    return TokenizerSettings(
        named={name: tokens[id] for name, id in roles.items() if id is not None},
        chat_template=file.get("tokenizer.chat_template", str),
        stops=frozenset(stops),
        add_bos=bool(file.get("tokenizer.ggml.add_bos_token", bool, add_bos)),
    )


def _byte_level(file: GGUFFile, tokens: list[str], types: list[int]) -> Tokenizer:
    name = file.metadata.get("tokenizer.ggml.pre")
    splitting = _SPLITTINGS.get(str(name))
    if splitting is None:
        raise TokenizerError(
            f"{file.path}: tokenizer.ggml.pre is {name!r}, a way to split texts that is not known here (known are "
            f"{', '.join(_SPLITTINGS)}); name the tokenizer that the model was converted from"
        )
    settings = _settings(file, tokens, types, add_bos=splitting.add_bos)
    joins = (join.partition(" ") for join in file.require_list("tokenizer.ggml.merges", str))
    merges = [(left, right) for left, _, right in joins]
    vocabulary = {text: id for id, text in enumerate(tokens)}
    added = {
        id: AddedToken(content=tokens[id], special=kind == _CONTROL)
        for id, kind in enumerate(types)
        if kind in (_CONTROL, _USER_DEFINED)
    }
    bos = settings.named.get("bos_token") if settings.add_bos else None
    values = byte_level(
        vocabulary,
        merges,
        splitting.patterns,
        bos=(bos, vocabulary[bos]) if bos is not None else None,
        whole_first=splitting.whole_first,
        normalizer=splitting.normalizer,
    )
    digest = hashlib.sha256(repr((name, tokens, types, merges)).encode()).hexdigest()
    return build(values, str(file.path), digest, replace(settings, added=added))


def _sentence_piece_model(file: GGUFFile, tokens: list[str], types: list[int]) -> bytes:
    """The tokens as a SentencePiece model, in protobuf.

    llama.cpp joins pieces by their scores, as SentencePiece does. It stores what users defined with spaces, where
    SentencePiece has its own letter for them.
    """
    scores = file.get_list("tokenizer.ggml.scores", float) or [0.0] * len(tokens)
    if len(scores) != len(tokens):
        raise TokenizerError(f"{file.path}: {len(tokens)} tokens have {len(scores)} scores; the file is damaged")
    unknown = file.get("tokenizer.ggml.unknown_token_id", int, 0)
    parts = []
    for id, (text, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        if id == unknown:
            kind = _UNKNOWN
        if kind == _USER_DEFINED:
            text = text.replace(" ", "▁")
        piece = _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind & 0xFFFFFFFF)
        parts.append(_field(1, piece))
    roles = {45: "unknown_token_id", 46: "bos_token_id", 47: "eos_token_id", 48: "padding_token_id"}
    trainer = _number(3, 2) + _number(4, len(tokens)) + _number(35, _BYTE in types)  # byte pairs; bytes as last resort
    for field, key in roles.items():
        role = file.get(f"tokenizer.ggml.{key}", int)
        if role is not None and 0 <= role < len(tokens):
            trainer += _field(field, tokens[role].encode())
    prefix = bool(file.get("tokenizer.ggml.add_space_prefix", bool, True))
    strip = bool(file.get("tokenizer.ggml.remove_extra_whitespaces", bool, False))
    normalizer = _field(1, b"identity") + _number(3, prefix) + _number(4, strip) + _number(5, True)
    return b"".join(parts) + _field(2, trainer) + _field(3, normalizer)


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


def _number(field: int, value: int) -> bytes:
    """A protobuf field that holds a number."""
    return _varint(field << 3) + _varint(int(value))


def _field(field: int, content: bytes) -> bytes:
    """A protobuf field that holds bytes."""
    return _varint(field << 3 | 2) + _varint(len(content)) + content
