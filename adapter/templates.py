"""Templates: the text that an instruction or a conversation is put into, in training and whenever it is answered.

`PromptTemplate` is a text with fields, such as Alpaca's. `ChatTemplate` is a model's own layout of conversations, a
jinja2 program as the Hugging Face hub's models have it. Both are saved in the header of an adapter.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter.errors import AdapterError
from adapter.json_object import parse_json

if TYPE_CHECKING:
    from adapter.chat_renderer import Rendering

DATE = "2024-07-26"
"""The day that chat templates take for today: the one that Llama 3's prints where it knows none. It is fixed, so that
training and answers see the same text."""


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """The text that an instruction is put into, with or without an input."""

    with_input: str
    """Contains `{instruction}` and `{input}`."""
    without_input: str
    """Contains `{instruction}`."""
    later: str = ""
    """Contains `{instruction}`: the text of the second and later turns of a conversation, which follows the answer
    before it; an empty one stands for `without_input`."""

    def __post_init__(self) -> None:
        needed = {"with_input": ("{instruction}", "{input}"), "without_input": ("{instruction}",)}
        if self.later:
            needed["later"] = ("{instruction}",)
        for name, fields in needed.items():
            for field in fields:
                if field not in getattr(self, name):
                    raise AdapterError(f"prompt template {name!r} must contain {field}")

    def render(self, instruction: str, input: str = "") -> str:
        """The prompt of an instruction; an empty input counts as none."""
        text = self.with_input if input else self.without_input
        # One pass of `re.sub`, not str.format: braces in the user's own text are not fields.
        fields = {"{instruction}": instruction, "{input}": input}
        return re.sub("{instruction}|{input}", lambda field: fields[field.group()], text)

    def render_later(self, instruction: str) -> str:
        """The prompt of a turn that follows others."""
        return (self.later or self.without_input).replace("{instruction}", instruction)

    @classmethod
    def read(cls, path: str | Path) -> "PromptTemplate":
        """Read `{"with_input": …, "without_input": …, "later"?: …}` from a JSON file.

        Raises AdapterError, naming the file, if it is not JSON or a template or field is missing.
        """
        try:
            fields = parse_json(Path(path).read_text(encoding="utf-8-sig"))
            later = fields.get("later") or ""
            return cls(with_input=fields["with_input"], without_input=fields["without_input"], later=later)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # ValueError: malformed JSON or UTF-8
            raise AdapterError(
                f"{path}: a prompt template is a JSON object in UTF-8 with 'with_input' and 'without_input': {error}"
            ) from error


ALPACA = PromptTemplate(
    with_input=(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    ),
    without_input=(
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    ),
    later="\n\n### Instruction:\n{instruction}\n\n### Response:",
)
"""The two templates of Stanford Alpaca, which LLaMA-Adapter is trained with; later turns repeat their headings."""

PLAIN = PromptTemplate(with_input="{instruction}\n\n{input}", without_input="{instruction}")
"""No template: the instruction as it stands."""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A model's layout of conversations."""

    source: str
    """The program, in jinja2."""
    date: str = DATE
    """The day, as YYYY-MM-DD, that the template takes for today."""

    def __post_init__(self) -> None:
        from adapter.chat_renderer import compile_template

        compile_template(self.source, self.date)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        special_tokens: Mapping[str, str],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        find: Callable[[str], bool] | None = None,
    ) -> "Rendering":
        """Render messages {role, content}, as `apply_chat_template` of transformers does.

        special_tokens: `Tokenizer.special_tokens`, which templates know by name, such as `bos_token`. tools: JSON
        schemas of functions. add_generation_prompt: end with the header of the answer that is to come. find: chooses
        the texts whose characters the result names in `given`.

        Raises RecordError for a conversation that the template refuses or fails on.
        """
        from adapter.chat_renderer import render_chat

        return render_chat(
            self.source,
            self.date,
            messages,
            special_tokens=special_tokens,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            find=find,
        )

    @classmethod
    def read(cls, path: str | Path) -> "ChatTemplate":
        """Read a `.jinja` file. Raises AdapterError, naming the file, if it cannot be read or parsed."""
        try:
            return cls(source=Path(path).read_text(encoding="utf-8-sig"))
        except (AdapterError, UnicodeDecodeError) as error:
            raise AdapterError(f"{path}: {error}") from error


Template = PromptTemplate | ChatTemplate
"""A template of either kind."""

_KINDS: dict[str, Any] = {"prompt": PromptTemplate, "chat": ChatTemplate}


def read_template(path: str | Path) -> Template:
    """Read a template: a chat template from a file named `.jinja`, `.jinja2` or `.j2`, otherwise a prompt template."""
    suffix = Path(path).suffix
    return ChatTemplate.read(path) if suffix in (".jinja", ".jinja2", ".j2") else PromptTemplate.read(path)


def template_fields(template: Template) -> dict[str, str]:
    """The template as an object of JSON, from which `parse_template` makes it again."""
    kind = next(kind for kind, template_class in _KINDS.items() if isinstance(template, template_class))
    return {"kind": kind, **asdict(template)}


def parse_template(fields: Any) -> Template:
    """The template of `template_fields`. Raises AdapterError for what is none."""
    if not isinstance(fields, Mapping) or not all(isinstance(text, str) for text in fields.values()):
        raise AdapterError(f"not a template: {fields!r:.80}")
    try:
        return _KINDS[fields["kind"]](**{name: text for name, text in fields.items() if name != "kind"})
    except (KeyError, TypeError) as error:
        raise AdapterError(f"not a template: {fields!r:.80}") from error
