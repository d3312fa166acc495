"""Imports point down: the models work without a cluster, and neither model knows the other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "adapter": {"cafo", "rayjobs", "ray", "deepspeed", "tests", "benchmarks"},
    "cafo": {"adapter", "rayjobs", "ray", "deepspeed", "tests", "benchmarks"},
    "rayjobs": {"tests", "benchmarks"},
}
SPARED = {
    "adapter": FORBIDDEN["adapter"],
    "cafo": FORBIDDEN["cafo"],
    "rayjobs": {"open_clip", "timm", "deepspeed", *FORBIDDEN["rayjobs"]},
}
"""What a process has no use for just because it imports us; towers and DeepSpeed take each of many workers seconds."""


def imported(file: Path) -> set[str]:
    """The top-level names of everything a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            names |= {str(a.value).split(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return names


@pytest.mark.parametrize("room", FORBIDDEN)
def test_no_file_imports_upwards_or_sideways(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    found = {str(file.relative_to(ROOT)): names for file in files if (names := imported(file) & FORBIDDEN[room])}
    assert not found


@pytest.mark.parametrize("room", SPARED)
def test_importing_every_module_loads_nothing_to_spare(room):
    files = sorted((ROOT / room).rglob("*.py"))
    modules = [".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files]
    script = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print(*sorted({SPARED[room]!r} & {{name.split('.')[0] for name in sys.modules}}))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""


@pytest.mark.parametrize("room", ["adapter", "cafo"])
def test_the_libraries_say_that_they_are_typed(room):
    assert (ROOT / room / "py.typed").is_file()
    assert f'{room} = ["py.typed"]' in (ROOT / "pyproject.toml").read_text(), "and take the mark with them"
