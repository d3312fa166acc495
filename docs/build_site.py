"""Build the documentation site: `python docs/build_site.py [FOLDER]`, by default into build/site.

The reference is written into docs/reference first: every job's settings out of its config class, every shipped config,
and pages that mkdocstrings fills from docstrings. Then Zensical builds the site; a warning is an error, as is a link or
an anchor that does not exist.
"""

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from types import ModuleType

import adapter
import cafo
from rayjobs.__main__ import JOBS, build_parser
from rayjobs.config_fields import FieldHelp, describe

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
SITE = ROOT / "build" / "site"


def write_reference(folder: Path) -> None:
    """Write the generated pages into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "jobs").mkdir(parents=True)
    for name, summary in JOBS.items():
        module = importlib.import_module(f"rayjobs.jobs.{name.replace('-', '_')}")
        (folder / "jobs" / f"{name}.md").write_text(job_page(name, summary, module), encoding="utf-8")
    (folder / "commands.md").write_text(commands_page(), encoding="utf-8")
    (folder / "configs.md").write_text(configs_page(sorted((ROOT / "configs").rglob("*.yaml"))), encoding="utf-8")
    for package in (adapter, cafo):
        (folder / f"{package.__name__}.md").write_text(api_page(package), encoding="utf-8")


def job_page(name: str, summary: str, module: ModuleType) -> str:
    """A job's page: what it does, and a table of its settings for each section."""
    lines = [f"# {name}", "", f"`rayjobs {name}`: {summary}.", "", (module.__doc__ or "").strip(), ""]
    fields = list(describe(module.Config))
    for section, of_section in groupby(fields, key=lambda field: field.name.rpartition(".")[0]):
        lines += [f"## {section or 'Without a section'}", "", *settings_table(of_section), ""]
    return "\n".join(lines)


def settings_table(fields: Iterable[FieldHelp]) -> list[str]:
    """The lines of a table of settings."""
    rows = [(f"`{f.name}`", f"`{f.type}`", f"`{f.default}`", f.meaning) for f in fields]
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    return lines + ["| " + " | ".join(_cell(text) for text in row) + " |" for row in rows]


def _cell(text: str) -> str:
    """A text that stands in one cell, in which nothing is taken for HTML or for a link."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    for i in range(0, len(parts), 2):  # outside of code
        parts[i] = parts[i].replace("<", "&lt;").replace("[", "\\[").replace("*", "\\*").replace("_", "\\_")
    return "`".join(parts)


def commands_page() -> str:
    """The commands that run no job, with their own help, and the options that all jobs have."""
    parser = build_parser()
    commands = next(action.choices for action in parser._actions if action.dest == "job")
    lines = ["# Commands", "", "Every job takes the options of the first one here."]
    for name in [next(iter(JOBS)), *(name for name in commands if name not in JOBS)]:
        usage = commands[name].format_help().rstrip()
        lines += ["", f"## {name}", "", "```text", usage, "```"]
    return "\n".join([*lines, ""])


def configs_page(files: Iterable[Path]) -> str:
    """The shipped configs: the comments that each opens with, and its settings."""
    lines = ["# Shipped configs", "", "Each opens with its command, and says what it was measured to do."]
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        lines += ["", f"## {name}", "", "```yaml", file.read_text(encoding="utf-8").rstrip(), "```"]
    return "\n".join([*lines, ""])


def api_page(package: ModuleType) -> str:
    """The page of a library, whose public names mkdocstrings fills in."""
    names = [name for name in package.__all__ if name[0].isupper()]
    names += [name for name in package.__all__ if name not in names]
    first = (package.__doc__ or "").strip().splitlines()[0]
    return "\n".join([f"# {package.__name__}", "", first, *(f"\n::: {package.__name__}.{name}" for name in names), ""])


def main(site: Path = SITE) -> int:
    """Write the reference and build the site; return Zensical's exit code."""
    write_reference(REFERENCE)
    shutil.rmtree(SITE, ignore_errors=True)
    built = subprocess.run([str(Path(sys.executable).with_name("zensical")), "build", "--strict", "--clean"], cwd=ROOT)
    if built.returncode == 0 and site != SITE:
        shutil.copytree(SITE, site, dirs_exist_ok=True)
    return built.returncode


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))
