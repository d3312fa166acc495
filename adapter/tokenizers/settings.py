"""The configuration files that a Hugging Face folder has beside its tokenizer.

`tokenizer_config.json` names the special tokens and, if `chat_template.jinja` is missing, holds the chat template.
`special_tokens_map.json` and `added_tokens.json` are older files with a part of it, read as transformers reads them:
only where `tokenizer_config.json` does not list its added tokens. `generation_config.json` and `config.json` know which
ids end an answer; a chat model has several.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter.errors import TokenizerError
from adapter.json_object import read_object
from adapter.tokenizers.base import SpecialIds

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token that was added to a tokenizer's vocabulary; it is found in texts before they are split into pieces."""

    content: str
    special: bool = True
    """A special token has no text of its own, and no text spells it."""
    lstrip: bool = False
    """Take the white space to its left along."""
    rstrip: bool = False
    """Take the white space to its right along."""
    single_word: bool = False
    normalized: bool = False

    def backend(self) -> "tokenizers.AddedToken":
        """The token as the library `tokenizers` wants it."""
        from tokenizers import AddedToken as Backend

        return Backend(**asdict(self))


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """The settings in the files beside a tokenizer."""

    named: dict[str, str] = field(default_factory=dict)
    """Name of a special token (`bos_token`, `eos_token`, ...) → text."""
    extra: tuple[str, ...] = ()
    """Texts of special tokens without a name."""
    added: dict[int, AddedToken] = field(default_factory=dict)
    """Id → a token that was added to the vocabulary."""
    chat_template: str | None = None
    stops: frozenset[int] = frozenset()
    """The ids that end an answer, by the model's own configuration."""
    first_stop: int | None = None
    add_bos: bool = True
    """Begin texts with BOS; counts where the tokenizer's own file does not tell."""
    legacy: bool = True
    """Put a space before each text after a special token, as LLaMA's own code does."""

    def special_ids(self, id_of: Callable[[str], int | None], *, bos: int | None) -> SpecialIds:
        """The special ids. id_of: a token's id, if it has one. bos: the id that the tokenizer begins texts with."""
        ids = {name: id_of(text) for name, text in self.named.items()}
        return SpecialIds(
            bos=bos,
            eos=self.first_stop if (eos := ids.get("eos_token")) is None else eos,
            stops=self.stops,
            pad=ids.get("pad_token"),
            unk=ids.get("unk_token"),
            texts=self.named,
        )


def read_settings(folder: Path) -> TokenizerSettings:
    """Read the configuration files of a folder, as many as it has. Raises TokenizerError for a malformed one."""
    config = _read_json(folder / "tokenizer_config.json")
    listed = _dict(config.get("added_tokens_decoder"))
    if wrong := [id for id in listed if not id.isdecimal()]:
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: added_tokens_decoder has {wrong[0]!r} where a number is to be; "
            "fetch the file again"
        )
    # a token whose text is empty is found in no text
    added = {int(id): added_token(token) for id, token in listed.items() if _dict(token).get("content") != ""}
    if textless := [id for id, token in added.items() if not token.content]:
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: added_tokens_decoder has no text for token {textless[0]}; fetch the "
            "file again"
        )
    if not added:
        config |= _read_json(folder / "special_tokens_map.json")
    named = {key: text for key, value in config.items() if key.endswith("_token") and (text := _text(value))}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):  # name → text
        named |= {name: text for name, value in extra.items() if (text := _text(value))}
        extra = []
    extras = tuple(text for value in (extra if isinstance(extra, list) else []) if (text := _text(value)))
    if not added:
        special = {*named.values(), *extras}
        listed = _read_json(folder / "added_tokens.json")
        added = {id: _listed_token(text, special) for text, id in listed.items() if isinstance(id, int)}
    stops = [id for file in ("generation_config.json", "config.json") for id in _eos_ids(_read_json(folder / file))]
    return TokenizerSettings(
        named=named,
        extra=extras,
        added=added,
        chat_template=_chat_template(folder, config),
        stops=frozenset(stops),
        first_stop=stops[0] if stops else None,
        add_bos=config.get("add_bos_token") is not False,
        legacy=bool(config.get("legacy", not config)),  # a folder of Hugging Face's says so if it is
    )


def _listed_token(text: str, special: set[str]) -> AddedToken:
    return AddedToken(content=text, special=text in special, normalized=text not in special)


def added_token(token: Any) -> AddedToken:
    """A token from an object in a configuration file; keys of another type count as absent, and so does its text."""
    flags = AddedToken.__dataclass_fields__.keys() - {"content"}
    given = {key: value for key, value in _dict(token).items() if key in flags and isinstance(value, bool)}
    return AddedToken(content=_text(token) or "", **given)


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a file; an empty one if there is no such file."""
    return read_object(file, TokenizerError) if file.is_file() else {}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(token: Any) -> str | None:
    """The text of a token, which is given as text or as an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _eos_ids(config: dict[str, Any]) -> list[int]:
    """`eos_token_id` of a model's configuration: one id or a list of them."""
    ids = config.get("eos_token_id")
    return [id for id in (ids if isinstance(ids, list) else [ids]) if isinstance(id, int)]


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The default template: from a file of its own or, as older folders have it, from the configuration."""
    try:
        if (file := folder / "chat_template.jinja").is_file():
            return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{file}: not a readable text ({error})") from error
    template = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [one for one in template if isinstance(one, dict) and one.get("name") == "default"]
        template = named[-1].get("template") if named else None
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None
