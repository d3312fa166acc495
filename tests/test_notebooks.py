"""The notebooks run as they stand, the training of one shortened, and are kept without what they print."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayjobs.demo.config import TinyClipConfig, TinyLlamaConfig
from rayjobs.demo.example_data import write_example_data
from tests.conftest import ROOT
from tests.waiting import PATIENCE_S

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs_and_is_linked(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert len(code) <= 10
    assert sum("plt." in "".join(cell["source"]) for cell in code) == 1, "one plot"
    for page in ("README.md", "docs/quickstart.md"):
        assert f"notebooks/{path.name}" in (ROOT / page).read_text(encoding="utf-8"), page


def execute(name: str, folder: Path, **changes: str) -> str:
    """Run a notebook in a folder, with some words of it replaced; return what it prints."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    for cell in notebook.cells:
        for old, new in changes.items():
            cell.source = cell.source.replace(old, new)
    resources: Any = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=PATIENCE_S, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.ray
@pytest.mark.slow
def test_the_notebook_of_the_adapter_runs(smollm2_gguf: Path, tmp_path: Path) -> None:
    printed = execute("adapter.ipynb", tmp_path, **{"RECORDS, HELD_OUT = 240, 24": "RECORDS, HELD_OUT = 48, 6"})
    assert "161,532 trained parameters" in printed
    assert "in JSON: 0 of 6 before" in printed
    assert (tmp_path / "runs" / "smollm2_json" / "report.html").is_file()


@pytest.mark.slow
def test_the_notebook_of_the_classifier_runs(tmp_path: Path) -> None:
    write_example_data(tmp_path / "examples", TinyLlamaConfig(steps=1), TinyClipConfig(steps=60))
    printed = execute("few_shot_classifier.ipynb", tmp_path)
    assert "estimated accuracy: " in printed
    assert " of 20 are right" in printed
    assert " of 160 images are outvoted" in printed
