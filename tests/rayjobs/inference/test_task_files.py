"""A task file of lm-evaluation-harness that its parser would crash or hang on is refused before it reads it."""

from pathlib import Path

import pytest

from rayjobs.errors import ConfigError
from rayjobs.inference.task_files import check_task_files

GROWING = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))
"""Lines that each copy the line before them nine times."""
TOO_MUCH = {
    "brackets": "[" * 100_000,
    "braces": '{"a":' * 100_000,
    "spread over lines": "[\n" * 100_000,
    "dashes": "- " * 100_000,
    "keys": "? " * 100_000,
    "after a good start": f"task: mine\ndoc_to_text: {'[' * 100_000}{']' * 100_000}",
    "holds itself": "task: mine\nx: &a [*a]",
    "grows": f"task: mine\n{GROWING}",
}


@pytest.mark.parametrize("kind", TOO_MUCH)
@pytest.mark.parametrize("included", [False, True])
def test_a_file_that_is_nested_too_deep_or_grows_is_named(tmp_path: Path, kind: str, included: bool) -> None:
    folder = tmp_path / "tasks"
    (folder / "inside").mkdir(parents=True)
    (folder / "good.yaml").write_text("task: good\nprocess_docs: !function utils.process\n")
    bad = tmp_path / "template" if included else folder / "inside" / "bad.yaml"
    bad.write_text(TOO_MUCH[kind])
    if included:
        (folder / "inside" / "mine.yaml").write_text("include: ../again\n")
        (folder / "again").write_text("include: [missing, ../template, ../tasks/inside/mine.yaml]\n")
    with pytest.raises(ConfigError, match=rf"{bad}: not usable YAML: over .* 60 levels.*take it out of the folder"):
        check_task_files(folder)


def test_what_the_harness_can_read_or_leaves_out_stays_its_own_matter(tmp_path: Path) -> None:
    for number, text in enumerate(
        (
            "task: mine\ninclude: 3",
            "a: [",
            "\0",
            "- 1",
            "",
            "a: !!timestamp 9999-99-99",
            "a: !function x\nb: !!python/x y",
        )
    ):
        (tmp_path / f"{number}.yaml").write_text(text)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    (tmp_path / "itself.yaml").symlink_to("itself.yaml")
    (tmp_path / "folder.yaml").mkdir()
    check_task_files(tmp_path)
