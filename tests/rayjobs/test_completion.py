"""Completion in a shell, asked as argcomplete's shell functions ask."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def complete(line: str, folder: Path) -> set[str]:
    """The completions that bash would show for a line."""
    answer = folder / "answer"
    shell = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": "fish", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    environment = {**os.environ, **shell, "_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "rayjobs"], cwd=folder, env=environment, check=True, capture_output=True)
    return {word.split("\t")[0].strip() for word in answer.read_text().replace("\x0b", "\n").splitlines() if word}


@pytest.mark.parametrize(("line", "expected"), [
    ("rayjobs adapter-tr", {"adapter-train"}),
    ("rayjobs adapter-train --config alp", {"alpaca_7b", "alpaca_tiny"}),
    ("rayjobs adapter-train train.ep", {"train.epochs="}),
    ("rayjobs adapter-train --config alpaca_7b adapter.method=z", {"adapter.method=zero_init"}),
    ("rayjobs adapter-train train.checkpoint_activations=", {"train.checkpoint_activations=true",
                                                            "train.checkpoint_activations=false"}),
    ("rayjobs adapter-train base.path=ba", {"base.path=base/", "base.path=base.gguf"}),
    ("rayjobs cafo nothing.like=", set()),
])  # fmt: skip
def test_a_line_is_completed(line: str, expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base.gguf").touch()
    assert complete(line, tmp_path) == expected
