"""The house's rules that a program can check: short files, short functions, documented public names."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

LONGEST_FILE = 350
LONGEST_FUNCTION = 60
INHERITED = {"forward", "backward", "log", "close"}
"""Methods whose base class or Protocol documents them."""

FRAGMENTS = ("Of ", "Whether ", "How ", "What ", "Where ", "Which ")
"""A docstring that begins so needs the name above it to be a sentence."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def definitions(tree: ast.Module) -> Iterator[Definition]:
    """Functions, classes and their methods, without functions inside functions."""
    for node in tree.body:
        if isinstance(node, Definition):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (method for method in node.body if isinstance(method, Definition))


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings of functions and classes, and texts that stand alone: those of constants and attributes."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                yield ast.get_docstring(node) or ""
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield text


@pytest.mark.parametrize("file", sources("rayjobs"), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_a_file_is_one_noun(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [n.name for n in functions if (n.end_lineno or 0) - n.lineno + 1 > LONGEST_FUNCTION]


@pytest.mark.parametrize("package", ["adapter", "cafo", "rayjobs"])
def test_public_names_are_documented_in_whole_phrases(package: str) -> None:
    missing, fragments = [], []
    for file in sources(package):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if tree.body and not ast.get_docstring(tree):
            missing.append(str(file.relative_to(ROOT)))
        fragments += [f"{file.relative_to(ROOT)}: {text}" for text in docstrings(tree) if text.startswith(FRAGMENTS)]
        for node in definitions(tree):
            name, docstring = f"{file.relative_to(ROOT)}: {node.name}", ast.get_docstring(node)
            trivial = isinstance(node, ast.FunctionDef) and (len(node.body) <= 2 or node.name in INHERITED)
            if not docstring and not node.name.startswith("_") and not trivial:
                missing.append(name)
    assert not fragments
    assert not missing
