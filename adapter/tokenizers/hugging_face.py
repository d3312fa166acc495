"""Hugging Face's tokenizers: `tokenizer.json`, run by the library `tokenizers`."""

import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from adapter.errors import TokenizerError
from adapter.json_object import parse_json
from adapter.tokenizers.base import MIN_UNUSED_ROWS, Rendered, Tokenizer, find_special
from adapter.tokenizers.settings import AddedToken, TokenizerSettings, added_token

if TYPE_CHECKING:
    import tokenizers


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`.

    It takes the texts of special tokens as text, always. To place a special token, `encode_rendered` writes an alias
    that nobody can guess, because it is drawn anew for each tokenizer, and takes the alias's id for the token's. (To
    encode the text between special tokens in parts would not do: some tokenizers put a space before the first.)
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        special: dict[str, AddedToken],
        ids: dict[str, int],
        settings: TokenizerSettings,
        name: str,
        sha256: str,
    ) -> None:
        """backend: the tokenizer, which is changed here. Its post-processor tells which BOS it begins texts with.

        special: alias → special token. ids: text → id of each special token.
        """
        backend.no_truncation()
        backend.no_padding()
        own = backend.get_vocab(with_added_tokens=False).values()
        self._vocab_size = 1 + max((*backend.get_vocab(with_added_tokens=True).values(), *ids.values()), default=-1)
        roles = settings.special_ids(lambda text: ids.get(text, backend.token_to_id(text)), bos=_bos(backend))
        super().__init__(name, sha256, roles, settings.chat_template)
        needed = (roles.bos, roles.eos, roles.pad, roles.unk)
        self._words = 1 + max((*own, *(id for id in needed if id is not None)), default=-1)

        # What else the post-processor does is to take the spaces out of tokens' spans.
        backend.post_processor = None
        self._special_ids = ids
        self._alias_of = {token.content: alias for alias, token in special.items()}
        self._id_of_alias = {}
        for alias, token in special.items():
            backend.add_tokens([replace(token, content=alias, special=False).backend()])
            self._id_of_alias[backend.token_to_id(alias)] = ids[token.content]
        self._backend = backend
        self._backend.encode_special_tokens = True  # as text

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True  # which does not survive pickling

    @property
    def vocab_size(self) -> int:
        """The largest id plus one. There may be ids without a token."""
        return self._vocab_size

    @property
    def rows_needed(self) -> int:
        """As `Tokenizer.rows_needed`; Gemma 3 has a token for images that bases for text alone do not embed."""
        return self._words if self.vocab_size - self._words <= MIN_UNUSED_ROWS else self.vocab_size

    def _encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _encode_rendered(self, text: str, verbatim: Sequence[tuple[int, int]]) -> Rendered:
        written, start = "", 0
        aliases = []  # start and end of each within what is written, and the characters that its token has more
        for low, high in find_special(self._special_ids, text, verbatim):
            alias = self._alias_of[text[low:high]]
            written += text[start:low] + alias
            aliases.append((len(written) - len(alias), len(written), high - low - len(alias)))
            start = high
        encoding = self._backend.encode(written + text[start:], add_special_tokens=False)
        ids, spans, shift = [], [], 0
        for id, (low, high) in zip(encoding.ids, encoding.offsets, strict=True):
            low += shift
            if aliases and low - shift <= aliases[0][0] and aliases[0][1] <= high:
                id = self._id_of_alias[id]
                shift += aliases.pop(0)[2]
            ids.append(id)
            spans.append((low, high + shift))
        return Rendered(ids, spans)

    def _added_tokens(self) -> Sequence[object]:
        return sorted(self._special_ids.items())

    def _decode(self, ids: list[int]) -> str:
        special = self._special_ids.values()
        return self._backend.decode([id for id in ids if id not in special], skip_special_tokens=False)


def read_tokenizer_json(content: bytes, name: str, settings: TokenizerSettings) -> HuggingFaceTokenizer:
    """The tokenizer of a `tokenizer.json`, with the tokens that its folder's settings add.

    Raises TokenizerError for a file that is malformed, or that the installed `tokenizers` cannot load.
    """
    try:
        values = parse_json(content)
    except ValueError as error:
        raise TokenizerError(f"{name}: not readable JSON ({error})") from error
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise TokenizerError(f"{name}: not a Hugging Face tokenizer: it has no object `model`")
    return build(values, name, hashlib.sha256(content).hexdigest(), settings)


def build(values: dict[str, Any], name: str, sha256: str, settings: TokenizerSettings) -> HuggingFaceTokenizer:
    """The tokenizer that the values of a `tokenizer.json` describe, with the tokens that the settings add.

    Raises TokenizerError for what the installed `tokenizers` cannot load.
    """
    import tokenizers

    nonce = secrets.token_hex(16)
    try:
        _add_tokens(values, settings)
        found = {token["content"]: token for token in values["added_tokens"] if token["special"]}
        special = {f"\ufdd0{nonce}{token['id']}\ufdd1": added_token(token) for token in found.values()}
        if values["model"].get("type") == "Unigram":
            _rename_pieces(values, {token.content: alias for alias, token in special.items()})
        backend = tokenizers.Tokenizer.from_str(json.dumps(values))
        ids = {text: token["id"] for text, token in found.items()}
        return HuggingFaceTokenizer(backend, special, ids, settings, name, sha256)
    except BaseException as error:  # the library raises nothing more special, and a panic of Rust's is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())
        raise TokenizerError(
            f"{name}: tokenizers {tokenizers.__version__} cannot load it ({reason}); if the file is whole, it was "
            "written by a later version: upgrade `tokenizers`"
        ) from error


def _rename_pieces(values: dict[str, Any], alias_of: dict[str, str]) -> None:
    """Give special pieces of a unigram model their aliases: it would find their texts in any text that spells them."""
    pieces = values["model"]["vocab"]
    renamed = {text for text, _ in pieces if text in alias_of}
    values["model"]["vocab"] = [[alias_of.get(text, text), score] for text, score in pieces]
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] not in renamed]


def byte_level(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    patterns: Sequence[str],
    *,
    bos: tuple[str, int] | None,
    whole_first: bool = True,
    normalizer: str | None = None,
) -> dict[str, Any]:
    """The values of a `tokenizer.json` of the usual kind: byte pairs within pieces that regular expressions split.

    vocabulary: tokens, in the letters that stand for bytes. merges: joins, the first to be done first. patterns: each
    splits what the one before left. bos: text and id of the token that begins texts. whole_first: a piece that is a
    token is not joined from its bytes. normalizer: a Unicode normal form.
    """
    splits = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    post_processor = None
    if bos is not None:
        name, id = bos
        text = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        token = {"id": name, "ids": [id], "tokens": [name]}
        post_processor = {"type": "TemplateProcessing", "single": text, "pair": text, "special_tokens": {name: token}}
    options = {
        "dropout": None,
        "unk_token": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": whole_first,
    }
    affixes = {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": normalizer} if normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, letters]},
        "post_processor": post_processor,
        "decoder": letters,
        "model": {"type": "BPE", **options, **affixes, "vocab": vocabulary, "merges": [list(pair) for pair in merges]},
    }


def _add_tokens(values: dict[str, Any], settings: TokenizerSettings) -> None:
    """Add the settings' tokens to those of a `tokenizer.json`, as special where they say so.

    A named special token that the vocabulary has not, such as a `pad_token` that no one trained, stays unknown: an id
    of its own would be one that no base embeds.
    """
    tokens = {token["content"]: token for token in values.get("added_tokens") or []}
    vocabulary = values["model"].get("vocab") or {}
    if isinstance(vocabulary, list):  # of tokens and their scores
        vocabulary = {token: id for id, (token, _) in enumerate(vocabulary)}
    for id, token in sorted(settings.added.items()):
        tokens.setdefault(token.content, {"id": id, **asdict(token)})
    for text in (*settings.named.values(), *settings.extra):
        if text in tokens:
            tokens[text] = {**tokens[text], "special": True}
        elif text in vocabulary:
            tokens[text] = {"id": vocabulary[text], **asdict(AddedToken(content=text))}
    values["added_tokens"] = sorted(tokens.values(), key=lambda token: token["id"])


def _bos(backend: "tokenizers.Tokenizer") -> int | None:
    """The id that the post-processor puts before every text, if it does."""
    bare, full = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    return full[0] if full[:1] != bare[:1] else None
