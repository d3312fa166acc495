"""The import graph of this project, drawn from the source: who imports whom, in how many floors, with what circles.

    python -m tests.import_graph [ROOT]

prints modules, arrows, floors and circles, by file and by package (`rayjobs.train`, `adapter`, …). Imports inside
functions count; those under `if TYPE_CHECKING` do not, since nothing happens there at run time.
"""

import ast
import sys
from collections.abc import Mapping
from pathlib import Path

PACKAGES = ("adapter", "cafo", "rayjobs")
Graph = dict[str, set[str]]


def read_graph(root: Path) -> Graph:
    """Every module below `root`'s packages, with the project's modules that it imports."""
    files = {name_of(file, root): file for package in PACKAGES for file in sorted((root / package).rglob("*.py"))}
    return {name: _imports(file, set(files)) - {name} for name, file in files.items()}


def name_of(file: Path, root: Path) -> str:
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def by_package(graph: Graph) -> Graph:
    """The same graph with each file's package in its place; a file directly below `rayjobs` is a package of its own."""
    packages: Graph = {}
    for module, imported in graph.items():
        packages.setdefault(package_of(module), set()).update(package_of(one) for one in imported)
    return {name: imported - {name} for name, imported in packages.items()}


def package_of(module: str) -> str:
    return ".".join(module.split(".")[:2]) if module.startswith("rayjobs.") else module.split(".")[0]


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (strongly connected components)."""
    reach = {module: _reachable(graph, module) for module in graph}
    groups = {tuple(sorted(one for one in reach[module] if module in reach[one])) for module in graph}
    return sorted(list(group) for group in groups if len(group) > 1)


def floors(graph: Mapping[str, set[str]]) -> int:
    """The number of modules on the longest way down; modules of one circle count as one."""
    together = {module: tuple(group) for group in circles(graph) for module in group}
    height: dict[str, int] = {}

    def climb(module: str) -> int:
        if module not in height:
            group = together.get(module, (module,))
            below = {one for member in group for one in graph[member]} - set(group)
            tallest = 1 + max((climb(one) for one in below), default=0)
            height.update(dict.fromkeys(group, tallest))
        return height[module]

    return max(climb(module) for module in graph)


def _reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    pending = [start]
    while pending:
        for module in graph[pending.pop()] - seen:
            seen.add(module)
            pending.append(module)
    return seen


def _imports(file: Path, known: set[str]) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    unused = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in unused:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in whole}
    return found & known


def main(root: Path) -> None:
    files = read_graph(root)
    files = {name: imported for name, imported in files.items() if (root / name.replace(".", "/")).is_dir() is False}
    files = {name: imported & set(files) for name, imported in files.items()}
    for title, graph in (("files", files), ("packages", by_package(files))):
        arrows = sum(map(len, graph.values()))
        print(
            f"{title}: {len(graph)} modules, {arrows} arrows, {floors(graph)} floors, circles: {circles(graph) or None}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
