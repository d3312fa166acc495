"""The template that records are put into: one that a setting names, the adapter's own, or what suits the records."""

import logging
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from adapter.records import scienceqa
from adapter.templates import ALPACA, PLAIN, ChatTemplate, Template, read_template
from adapter.tokenizers.base import Tokenizer
from rayjobs.errors import ConfigError
from rayjobs.storage.download import cached_path

if TYPE_CHECKING:
    from adapter.adapter_file import AdapterFile
    from rayjobs.data.records import Source

logger = logging.getLogger(__name__)

NAMED = {"alpaca": ALPACA, "scienceqa": scienceqa.TEMPLATE, "plain": PLAIN}
_LOOKED_AT = 256
"""Usable records of a source by which a template is chosen."""

CHAT = "chat"
"""Name of the model's own chat template."""


def named_template(name: str, tokenizer: Tokenizer) -> Template:
    """Return a template by its name or file.

    Raises:
        ConfigError: the model has no chat template, or there is neither a template nor a file of this name.
        AdapterError: the file is not a template.
    """
    if name == CHAT:
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"template is chat, but {tokenizer.name} brings no chat template: name a .jinja file, or another "
                "template"
            )
        return ChatTemplate(source=tokenizer.chat_template)
    if name in NAMED:
        return NAMED[name]
    if not (path := cached_path(name)).is_file():
        raise ConfigError(f"template is {name}, which is no file, nor one of {', '.join((CHAT, *NAMED))}")
    return read_template(path)


def saved_template(name: str | None, tokenizer: Tokenizer, saved: "AdapterFile | None", format: str = "") -> Template:
    """Return the template to answer in: the named one, else that of the adapter's training, else Alpaca's.

    Args:
        name: the name or file of a setting; None if it names none.
        tokenizer: the model's.
        saved: the adapter; None without one.
        format: format of the records, whose own template an adapter may have been trained in.
    """
    trained = saved and (saved.format_templates.get(format) or saved.template)
    if name is None:
        return trained or ALPACA
    template = named_template(name, tokenizer)
    if trained and trained != template:
        logger.warning("template=%s is not the template that the adapter was trained in", name)
    return template


def source_templates(
    sources: Iterable["Source"], tokenizer: Tokenizer, saved: "AdapterFile | None" = None
) -> list[Template]:
    """Return each source's template: the one that is named, else that of the adapter's training, else its own.

    Args:
        sources: sources of records.
        tokenizer: the model's.
        saved: the adapter that is measured; None for one that is to be trained.
    """
    return [_source_template(source, tokenizer, saved) for source in sources]


def _source_template(source: "Source", tokenizer: Tokenizer, saved: "AdapterFile | None") -> Template:
    if source.template is not None or (saved and saved.template):
        return saved_template(source.template, tokenizer, saved, source.format)
    if source.format in ("scienceqa", "llava"):
        return scienceqa.TEMPLATE if source.format == "scienceqa" else ALPACA
    usable = list(islice((record for record in source.read() if "rejected" not in record), _LOOKED_AT))
    # prompts and texts stand in no template, whatever stands beside them
    first = next((record for record in usable if "prompt" not in record and "text" not in record), None)
    if first and "messages" in first and tokenizer.chat_template is not None:
        return ChatTemplate(source=tokenizer.chat_template)
    return ALPACA if first or not usable else PLAIN


def describe_sources(sources: Iterable["Source"], templates: Iterable[Template]) -> str:
    """Describe, in a line, what each source is read as and the template that its records are put into."""
    return "; ".join(
        f"{source.describe()}, in {_describe(template)}" for source, template in zip(sources, templates, strict=False)
    )


def _describe(template: Template) -> str:
    if isinstance(template, ChatTemplate):
        return "a chat template"
    return next((f"the template {name}" for name, known in NAMED.items() if known == template), "a template of its own")


def header_templates(
    sources: Sequence["Source"], templates: Sequence[Template]
) -> tuple[Template, dict[str, Template]]:
    """Return the template for an adapter's header, and those of formats of records that were trained in another.

    The first source decides, and the first of each format.
    """
    by_format: dict[str, Template] = {}
    for source, template in zip(sources, templates, strict=True):
        if by_format.setdefault(source.format, template) != template:
            logger.warning(
                "%s is trained in another template than the sources of its format before it, whose template alone is "
                "saved with the adapter",
                source.path,
            )
    first = templates[0]
    return first, {format: template for format, template in by_format.items() if template != first}
