"""Build the documentation site: `python docs/build_site.py [FOLDER]`, by default into build/site.

The reference is written into docs/reference first: every job's settings out of its config class, every shipped config,
and pages that mkdocstrings fills from docstrings. Then Zensical builds the site; a warning is an error, as is a link or
an anchor that does not exist.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import adapter
import cafo
from rayjobs.__main__ import JOBS, build_parser
from rayjobs.config_fields import FieldHelp, describe_sections
from rayjobs.job_help import config_class, description
from rayjobs.shipped_configs import list_configs

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
SITE = ROOT / "build" / "site"


def write_reference(folder: Path) -> None:
    """Write the generated pages into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "jobs").mkdir(parents=True)
    for name, summary in JOBS.items():
        (folder / "jobs" / f"{name}.md").write_text(job_page(name, summary), encoding="utf-8")
    (folder / "commands.md").write_text(commands_page(), encoding="utf-8")
    (folder / "configs.md").write_text(configs_page(), encoding="utf-8")
    for package in (adapter, cafo):
        (folder / f"{package.__name__}.md").write_text(api_page(package), encoding="utf-8")


def check_navigation() -> None:
    """Raise ValueError unless the navigation leads to every page."""
    listed = set(re.findall(r'"([\w./-]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8")))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    if listed != pages:
        raise ValueError(f"zensical.toml: not pages: {sorted(listed - pages)}; not listed: {sorted(pages - listed)}")


def job_page(name: str, summary: str) -> str:
    """A job's page: what it does, and a table of its settings for each section."""
    lines = [f"# {name}", "", f"`rayjobs {name}`: {summary}.", "", description(name), ""]
    for section in describe_sections(config_class(name)):
        title = f"`{section.name}`" if section.name else "Settings"
        lines += [f"## {title}", "", *([_cell(section.meaning), ""] if section.name and section.meaning else [])]
        lines += [*settings_table(section.fields), ""]
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


def configs_page() -> str:
    """The configs that `--config NAME` finds, each with the comment that it opens with."""
    lines = [
        "# Shipped configs",
        "",
        "`--config NAME` takes each, and `rayjobs configs` lists and copies them. Each opens",
    ]
    lines += ["with its command, and says what it was measured to do."]
    for config in list_configs():
        text = config.path.read_text(encoding="utf-8").rstrip()
        lines += ["", f"## {config.name}", "", f"For `{config.job}`.", "", "```yaml", text, "```"]
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
    check_navigation()
    shutil.rmtree(SITE, ignore_errors=True)
    built = subprocess.run([str(Path(sys.executable).with_name("zensical")), "build", "--strict", "--clean"], cwd=ROOT)
    if built.returncode == 0 and site != SITE:
        shutil.copytree(SITE, site, dirs_exist_ok=True)
    return built.returncode


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))
