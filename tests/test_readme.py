"""What README.md and docs/ tell a user to type or to write, done in their order on small real inputs."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from rayjobs.__main__ import JOBS, main
from tests.conftest import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), flags=re.M | re.S)


def commands(document: Path) -> list[list[str]]:
    """Every command line of the document's shell blocks, as words."""
    lines = "\n".join(blocks(document, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


ALL = [(document.name, words) for document in DOCUMENTS for words in commands(document)]
OURS = [words for _, words in ALL if words[:3] == ["python", "-m", "rayjobs"]]


@pytest.mark.parametrize(("document", "words"), [c for c in ALL if c[1] not in OURS], ids=lambda part: " ".join(part)[:60])
def test_other_tools_are_told_what_they_understand(document: str, words: list[str]) -> None:
    tool, *arguments = words
    if tool == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert arguments[0] in targets
    elif tool == "ray":
        from ray.scripts.scripts import cli

        assert arguments[0] in cli.commands
        for file in arguments:
            if file.endswith(".yaml"):
                assert yaml.safe_load((ROOT / file).read_text())["cluster_name"]
    else:
        assert words in (["source", ".venv/bin/activate"], ["pip", "install", "boto3"])
