"""The help of a job: what it does, and its settings by section. Nothing of a job is imported but its config."""

import ast
import importlib
import shutil
import textwrap
from pathlib import Path
from typing import Any

from rayjobs.config_fields import FieldHelp, describe_sections


def config_class(job: str) -> Any:
    """Return the `Config` of a job such as `adapter-train`."""
    return importlib.import_module(f"rayjobs.job_configs.{_module(job)}").Config


def description(job: str) -> str:
    """Return the docstring of a job's module, which is read and not imported, since that imports PyTorch and Ray."""
    source = Path(__file__).parent / "jobs" / f"{_module(job)}.py"
    return ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""


def settings_help(job: str) -> str:
    """Return the help of all settings: by section, each with its values, its default and its meaning."""
    width = shutil.get_terminal_size((120, 24)).columns
    lines = []
    for section in describe_sections(config_class(job)):
        title = f"{section.name}: {section.meaning}" if section.name else f"{job} itself:"
        lines += ["", *textwrap.wrap(title, width, subsequent_indent="  ")]
        for field in section.fields:
            lines += [*_wrap(_headline(field), width, 2), *_wrap(field.meaning, width, 6)]
    return "\n".join(lines)


def _headline(field: FieldHelp) -> str:
    default = field.default if field.default.startswith("required") else f"default {field.default}"
    return f"{field.name}  ({field.type}, {default})"


def _wrap(text: str, width: int, indent: int) -> list[str]:
    """Lines of at most `width` columns; words that are longer, such as paths, stay whole."""
    first, others = " " * indent, " " * max(indent, 6)
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def _module(job: str) -> str:
    return job.replace("-", "_")
