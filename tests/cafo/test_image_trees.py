"""Folders as data sets: stratified splits that leave every class a training image, and splits that are given."""

from collections import Counter
from pathlib import Path

import pytest

from cafo.datasets import stable_uniform
from cafo.image_trees import DEFAULT_SHARES, apportion, load_tree


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")


def tree(root: Path, **counts: int) -> Path:
    touch(root, *(f"{name}/{i}.png" for name, count in counts.items() for i in range(count)))
    return root


@pytest.mark.parametrize("shares", [DEFAULT_SHARES, (0.1, 0.1), (0.01, 0.9), (1.0, 0.0), (0.7, 0.3)])
def test_a_class_is_divided_in_its_shares_and_has_a_training_image(shares: tuple[float, float]) -> None:
    for count in range(1, 60):
        parts = apportion(count, shares)
        assert sum(parts) == count
        assert parts[0] >= 1
        wanted = (shares[0] * count, shares[1] * count, (1 - sum(shares)) * count)
        most = 1 if parts[0] > 1 or shares[0] * count >= 0.5 else 2  # one may be taken for train
        assert all(abs(part - exact) <= most + 1e-6 for part, exact in zip(parts, wanted, strict=True))


def test_the_smallest_classes() -> None:
    assert [apportion(count, DEFAULT_SHARES) for count in (1, 2, 3, 4, 5, 10)] == [
        (1, 0, 0), (1, 0, 1), (1, 1, 1), (2, 1, 1), (3, 1, 1), (5, 2, 3),
    ]  # fmt: skip


def test_a_split_is_stratified_by_class_and_by_the_seed_and_path_alone(tmp_path: Path) -> None:
    root = tree(tmp_path, ant=100, bee=37, cat=3)
    dataset = load_tree(root, seed=3)
    test = dataset.open_test()
    assert dataset.class_names == ("ant", "bee", "cat")
    counts = [Counter(item.class_name for item in split) for split in (dataset.train, dataset.val, test)]
    assert [tuple(count[name] for count in counts) for name in dataset.class_names] == [
        (50, 20, 30),
        (19, 7, 11),
        (1, 1, 1),
    ]
    assert len({*dataset.train, *dataset.val, *test}) == 140
    ants = sorted((f"ant/{i}.png" for i in range(100)), key=lambda path: stable_uniform(3, path))
    assert {item.path for item in dataset.train if item.label == 0} == set(ants[:50])
    again = load_tree(root, seed=3)
    assert (again.train, again.val, again.open_test()) == (dataset.train, dataset.val, test)
    assert load_tree(root, seed=4).train != dataset.train
    touch(root, "bee/more.png")  # moves bees at most
    changed = load_tree(root, seed=3)
    assert [i for i in changed.train if i.label != 1] == [i for i in dataset.train if i.label != 1]
    with pytest.raises(ValueError, match="no class folders"):
        load_tree(root / "cat")
    for shares in ((0.0, 0.5), (0.8, 0.3), (-0.1, 0.5)):
        with pytest.raises(ValueError, match="with some for train; got"):
            load_tree(root, shares=shares)


def test_where_the_classes_have_few_images_all_are_training_images(tmp_path: Path) -> None:
    dataset = load_tree(tree(tmp_path, ant=20, bee=1, cat=90))
    assert (len(dataset.train), dataset.val, dataset.open_test()) == (111, (), ())
    shared = load_tree(tmp_path, shares=(0.5, 0.2))
    assert {item.class_name for item in shared.train} == {"ant", "bee", "cat"}
    assert len(shared.val) + len(shared.open_test()) == 10 + 45


def test_folders_of_splits_are_read_as_such(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "train/ant/1.png",
        "train/bee/1.png",
        "train/bee/2.png",
        "val/bee/1.png",
        "test/ant/9.png",
        "notes.txt",
    )
    dataset = load_tree(tmp_path, seed=1)
    assert dataset.class_names == ("ant", "bee")
    assert dataset.train == (
        ("train/ant/1.png", 0, "ant"),
        ("train/bee/1.png", 1, "bee"),
        ("train/bee/2.png", 1, "bee"),
    )
    assert dataset.val == (("val/bee/1.png", 1, "bee"),)
    assert dataset.open_test() == (("test/ant/9.png", 0, "ant"),)
    assert all((dataset.image_root / item.path).is_file() for item in dataset.train)
    touch(tmp_path, "test/wasp/1.png")
    assert load_tree(tmp_path).class_names == ("ant", "bee")
    with pytest.raises(ValueError, match="wasp have no training images"):
        dataset.open_test()
    touch(tmp_path, "val/wasp/1.png")
    with pytest.raises(ValueError, match="no training images of wasp"):
        load_tree(tmp_path)


def test_val_and_test_may_be_missing_or_have_other_usual_names(tmp_path: Path) -> None:
    touch(tmp_path, "one/train/ant/1.png", "one/train/bee/1.png", "two/Train/ant/1.png", "two/Validation/ant/2.png")
    one, two = load_tree(tmp_path / "one"), load_tree(tmp_path / "two")
    assert (len(one.train), one.val, one.open_test()) == (2, (), ())
    assert two.val == (("Validation/ant/2.png", 0, "ant"),)
    touch(tmp_path, "two/val/ant/3.png")
    with pytest.raises(ValueError, match="name one split twice"):
        load_tree(tmp_path / "two")


def test_classes_that_are_called_train_and_test_are_classes(tmp_path: Path) -> None:
    touch(tmp_path, "a/train/1.png", "a/test/1.png", "b/train/x/1.png", "b/plane/1.png")
    assert load_tree(tmp_path / "a").class_names == ("test", "train")
    with pytest.raises(ValueError, match=r"train \(holds x\)"):
        load_tree(tmp_path / "b")
