"""Contradictory splits and class lists are refused or noted by name; changes of classes are told one by one."""

import json
from pathlib import Path
from typing import Any

import pytest

from cafo.dataset_checks import class_changes
from cafo.datasets import Dataset, load_split
from cafo.errors import DatasetError
from cafo.image_trees import load_tree


def load(folder: Path, **parts: Any) -> Dataset:
    base = {"train": [["a/1.jpg", 0, "ant"], ["b/1.jpg", 1, "bee"]], "val": [["a/2.jpg", 0, "ant"]], "test": []}
    (folder / "split.json").write_text(json.dumps({**base, **parts}))
    return load_split(folder / "split.json", folder)


def test_one_image_in_two_splits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"1 images are in train and in val: a/1\.jpg"):
        load(tmp_path, val=[["a/1.jpg", 0, "ant"]])
    dataset = load(tmp_path, test=[["./a/2.jpg", 0, "ant"], ["b/1.jpg", 1, "bee"], ["b/3.jpg", 1, "bee"]])
    with pytest.raises(DatasetError, match=r"in val and in test: \./a/2\.jpg; 1 images are in train and in test: b/1"):
        dataset.open_test()


def test_one_path_with_two_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"b/1\.jpg has two labels: 'bee' and 'ant'"):
        load(tmp_path, train=[["b/1.jpg", 1, "bee"], ["b/1.jpg", 0, "ant"]])
    with pytest.raises(DatasetError, match=r"test: c\.jpg has two labels"):
        load(tmp_path, test=[["c.jpg", 0, "ant"], ["c.jpg", 1, "bee"]]).open_test()


def test_two_classes_of_one_name_are_refused_and_similar_names_noted(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="'ant' is the name of classes 0, 1"):
        load(tmp_path, train=[["a/1.jpg", 0, "ant"], ["b/1.jpg", 1, "ant"]])
    with pytest.raises(DatasetError, match="class 1 has the name ' '"):
        load(tmp_path, train=[["a/1.jpg", 0, "ant"], ["b/1.jpg", 1, " "]])
    for name in ("Ant_Lion", "ant  lion"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / "1.png").touch()
    assert load_tree(tmp_path / "tree").notices == (
        "classes 'Ant_Lion' and 'ant  lion' differ only in case, spaces or underscores; one class or several?",
    )


def test_a_path_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"caf\\xe9\.jpg' is not UTF-8"):
        load(tmp_path, train=[["a/1.jpg", 0, "ant"], ["caf\udce9.jpg", 1, "bee"]])


@pytest.mark.parametrize("template", ["a photo", "a {} of {}", "a {name}", "a {0}", "{{}}", "{}!{", "a {:>5}"])
def test_a_template_needs_one_pair_of_braces(tmp_path: Path, template: str) -> None:
    load(tmp_path)
    with pytest.raises(ValueError, match=r"needs one \{\} for the class name"):
        load_split(tmp_path / "split.json", tmp_path, templates=[template])
    assert load_split(tmp_path / "split.json", tmp_path, templates=["{}"]).templates == ("{}",)


def test_text_in_place_of_a_list_is_refused(tmp_path: Path) -> None:
    load(tmp_path)
    for arguments in ({"templates": "a photo of a {}."}, {"class_names": "ab"}):
        with pytest.raises(ValueError, match=r"should be a list, got the text .* put it in brackets"):
            load_split(tmp_path / "split.json", tmp_path, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ['{"train": [["a.jp', "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"])
def test_a_split_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(ValueError, match=r"split\.json is (not JSON: Unterminated .*char 12|a Git LFS pointer)"):
        load_split(tmp_path / "split.json", tmp_path)


@pytest.mark.parametrize(
    ("before", "now", "change"),
    [
        ("abc", "abc", ""),
        ("ac", "abc", "added: 'b'"),
        ("abc", "ac", "removed: 'b'"),
        ("abc", "axc", "renamed: 'b' is now 'x'"),
        ("abc", "xab", "removed: 'c'; added: 'x'"),
        ("abc", "acb", "the same classes in another order: 'b' was where 'c' is now"),
    ],
)
def test_changes_of_classes_are_told_by_name(before: str, now: str, change: str) -> None:
    assert class_changes([*before], [*now]) == change
