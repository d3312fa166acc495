"""Imports point down: the models work without a cluster, neither knows the other, and rayjobs is built in floors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.import_graph import by_package, circles, package_of, read_graph

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "adapter": {"cafo", "rayjobs", "ray", "deepspeed", "tests", "benchmarks"},
    "cafo": {"adapter", "rayjobs", "ray", "deepspeed", "tests", "benchmarks"},
    "rayjobs": {"tests", "benchmarks"},
}
SPARED = {
    "adapter": FORBIDDEN["adapter"],
    "cafo": {"openai", "diffusers", *FORBIDDEN["cafo"]},
    "rayjobs": {"open_clip", "timm", "deepspeed", *FORBIDDEN["rayjobs"]},
}
"""What a process has no use for just because it imports us; encoders and DeepSpeed take each worker seconds."""


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


ORDER = [
    "__main__",
    "completion",
    "job_help",
    "verify",
    "jobs",
    "job_configs",
    "serve",
    "demo",
    "tune",
    "inference",
    "train",
    "lifecycle",
    "reporting",
    "data",
    "runs",
    "models",
    "cluster",
    "config",
    "config_fields",
    "shipped_configs",
    "console",
    "storage",
    "errors",
]
"""The packages of rayjobs, from the top down: each may import only those that stand behind it."""


def test_rayjobs_imports_only_downwards():
    graph = read_graph(ROOT)
    place = {f"rayjobs.{name}": floor for floor, name in enumerate(ORDER)}
    inside = {
        name: imported for name, imported in graph.items() if package_of(name) != "rayjobs" and "rayjobs." in name
    }
    assert {package_of(name) for name in inside} == set(place), "every package of rayjobs has its place in ORDER"
    upward = [
        f"{name} -> {one}"
        for name, imported in inside.items()
        for one in imported
        if place.get(package_of(one), len(place)) < place[package_of(name)]
    ]
    assert not upward


def test_nothing_imports_in_a_circle():
    graph = read_graph(ROOT)
    assert not circles(graph)
    assert not circles(by_package(graph))


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


@pytest.mark.parametrize("room", ["adapter", "cafo", "rayjobs"])
def test_the_libraries_say_that_they_are_typed(room):
    assert (ROOT / room / "py.typed").is_file()
    assert f'{room} = ["py.typed"' in (ROOT / "pyproject.toml").read_text(), "and take the mark with them"
