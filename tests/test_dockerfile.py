"""The Dockerfile against the tree: what it copies is there, and its user is not root. Nothing is built."""

import shlex

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib
from tests.conftest import ROOT

LINES = (ROOT / "Dockerfile").read_text().splitlines()
IGNORED = (ROOT / ".dockerignore").read_text().split()


def instructions(name: str) -> list[list[str]]:
    """The words of every instruction of this name, in their order."""
    return [shlex.split(line)[1:] for line in LINES if line.startswith(f"{name} ")]


def test_what_git_ignores_stays_out_of_the_image() -> None:
    """A pattern of .gitignore holds in every folder, one of .dockerignore only at the top unless it opens with `**`."""
    patterns = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    same = {pattern[1:] if pattern.startswith("/") else f"**/{pattern}" for pattern in patterns}
    assert same | {".git"} <= set(IGNORED)
    assert not [line for line in IGNORED if line.startswith("!")]


def test_the_first_layer_has_what_the_installation_reads() -> None:
    first, rest = ([word for word in words if not word.startswith("--")] for words in instructions("COPY"))
    assert rest == [".", "."]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {"pyproject.toml", "constraints.txt", project["readme"], *project["license-files"]}
    assert set(first[:-1]) == needed
    assert all((ROOT / name).is_file() for name in needed)
    ((workdir,),) = instructions("WORKDIR")
    assert first[-1] == f"{workdir}/"


def test_the_image_installs_extras_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (target,) = [words[-1] for words in instructions("RUN") if words[-1] != "."]
    assert target.startswith(".[")
    assert set(target[2:-1].split(",")) <= set(project["optional-dependencies"])


def test_the_user_is_a_number_and_not_root() -> None:
    """Kubernetes can tell only of a number that it is not root."""
    ((user,),) = instructions("USER")
    assert int(user) > 0
    order = [line.split()[0] for line in LINES if line and not line.startswith("#")]
    assert order.index("USER") < min(order.index("COPY"), order.index("RUN"))
