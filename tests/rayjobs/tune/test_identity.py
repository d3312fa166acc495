"""A sweep's inputs are known by class name, path and content; a difference is refused by name once trials are over."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cafo.datasets import Dataset
from cafo.fewshot import FewShot
from cafo.items import Item
from rayjobs.data.feature_store import Features, RejectedImage
from rayjobs.data.few_shot_images import EncodedImages, FewShotPlan, encode_few_shot
from rayjobs.data.image_list import ImageList, plain_list
from rayjobs.data.text_classifier import ClassifierFile
from rayjobs.storage.files import read_json, write_json
from rayjobs.tune.identity import check_same_classes, check_same_inputs
from rayjobs.tune.images import SweepImage, duplicate_notices
from rayjobs.tune.inputs import SweepInputs, share_inputs
from rayjobs.tune.search_space import Setting, Trial
from rayjobs.tune.trial import read_trial_result

NAMES = ("ant", "bee")


class FakeStore:
    """A feature store without encoders: a feature is the number of an image's name, and some images are unreadable."""

    def __init__(self, *unreadable: str) -> None:
        self.unreadable = unreadable
        self.encoded: list[str] = []

    def load(self, lists: list[ImageList], **_: Any) -> dict[str, Features]:
        return {images.role: self._features(images) for images in lists}

    def _features(self, images: ImageList) -> Features:
        self.encoded += [item.path for item in images.items]
        rows = [row for row, item in enumerate(images.items) if item.path not in self.unreadable]
        numbers = [[float(Path(images.items[row].path).stem)] for row in rows]
        values = np.array(numbers, np.float32).reshape(1, len(rows), 1)
        rejected = [
            RejectedImage(images.role, item.path, "cut") for item in images.items if item.path in self.unreadable
        ]
        contents = tuple(f"content of {item.path}" for item in images.items)
        return Features(
            rows=tuple(rows), values={"clip": values}, rejected=tuple(rejected), stores={}, contents=contents
        )


def dataset(names: tuple[str, ...] = NAMES, without: str = "") -> Dataset:
    train = [Item(f"{name}/{i}.png", label, name) for label, name in enumerate(names) for i in range(6)]
    val = [Item(f"{name}/{i}.png", label, name) for label, name in enumerate(names) for i in range(6, 9)]
    kept = [tuple(item for item in items if item.path != without) for items in (train, val)]
    templates = ("a {}.",)
    return Dataset(
        name="d", class_names=names, templates=templates, image_root=Path(), train=kept[0], val=kept[1], read_test=tuple
    )


def plan(data: Dataset, short: Any = "error") -> FewShotPlan:
    return FewShotPlan(dataset=data, shots=[2, 3], seeds=[0], short=short)


def encode(
    choices: FewShotPlan, store: Any = None, others: Sequence[ImageList] = (), plain: bool = False
) -> EncodedImages:
    return encode_few_shot(store or FakeStore(), choices, 1, others, plain=plain)


def classifier_file(store: str) -> ClassifierFile:
    weights: Any = None  # nothing here reads them
    return ClassifierFile(store, weights, 1, 0)


def inputs(data: Dataset, store: FakeStore | None = None) -> SweepInputs:
    images = encode(plan(data), store, [plain_list("val", Path(), data.val)])
    classifier = classifier_file("s")
    return SweepInputs(
        dataset=data,
        images=images,
        generated={0: ()},
        classifiers={("clip", "file"): classifier},
        identities={"clip": "CLIP-1"},
    )


def paths(choice: FewShot) -> list[str]:
    return [item.path for item in choice.items]


def test_an_unreadable_choice_gives_way_and_nothing_is_encoded_twice() -> None:
    data = dataset()
    readable = encode(plan(data))
    first, second = paths(plan(data).choose()[2, 0])[:2]  # both ants of K = 2
    store = FakeStore(first)
    found = encode(plan(data), store)
    assert len(store.encoded) == len(set(store.encoded)) == 2 * 3 + 1
    for key, choice in found.choices.items():
        before = paths(readable.choices[key])
        kept = [path for path in before if path != first]
        assert [path for path in paths(choice) if path in before] == kept
        assert len(paths(choice)) == len(before)
    assert paths(found.choices[2, 0])[0] == second

    several = FakeStore(*(f"ant/{i}.png" for i in range(4)))
    with pytest.raises(ValueError, match=r"ant \(2\).*cannot be read: ant/\d\.png, ant/\d\.png"):
        encode(plan(data), several)
    found = encode(plan(data, "report"), several)
    assert found.choices[3, 0].short == {"ant": 2}


def test_the_rows_of_a_choice_are_its_images_features() -> None:
    data = dataset()
    bad = paths(plan(data).choose()[2, 0])[0]
    given = replace(inputs(data, FakeStore(bad)), classifiers={})
    shared = share_inputs(given, {})
    for key, rows in shared.few_shot.items():
        items = given.images.choices[key].items
        assert shared.views["clip"][0, rows, 0].tolist() == [float(Path(item.path).stem) for item in items]
        assert shared.labels[rows].tolist() == [item.label for item in items]


def test_plain_features_and_groups_are_those_of_each_image() -> None:
    data = dataset()
    images = encode(plan(data), plain=True)
    contents = {item.path: f"content of {item.path}" for item in images.lists["train"].items}
    first, second = list(contents)[:2]
    contents[second] = contents[first]
    train = replace(
        images.features["train"], contents=tuple(contents[item.path] for item in images.lists["train"].items)
    )
    given = replace(inputs(data), images=replace(images, features={**images.features, "train": train}), classifiers={})
    shared = share_inputs(given, {2: "crossfit"})
    assert shared.plain_rows is not None
    assert shared.groups is not None
    assert (shared.val, len(shared.val_labels), shared.select) == ({}, 0, {2: "crossfit"})
    for rows in shared.few_shot.values():
        assert shared.plain["clip"][shared.plain_rows[rows]].tolist() == shared.views["clip"][0, rows].tolist()
    twins = [path for path in contents if path in (first, second)]
    at = [list(contents).index(path) for path in twins]
    assert len({int(shared.groups[row]) for row in at}) == 1
    assert len(set(shared.groups.tolist())) == len(contents) - 1
    assert [image.role for image in given.readable_images()] == ["train"] * len(contents)  # each once


def test_validation_images_can_join_every_choice(tmp_path: Path) -> None:
    data = dataset()
    bad = data.val[0].path
    joined = replace(plan(data), joined=data.val)
    images = encode(joined, FakeStore(bad), plain=True)
    before = plan(data).choose()
    for key, choice in images.choices.items():
        assert {*choice.items} == {*before[key].items, *(item for item in data.val if item.path != bad)}
        assert [item.label for item in choice.items] == sorted(item.label for item in choice.items)
    apart = inputs(data)
    check_same_inputs(tmp_path, apart)
    finish_a_trial(tmp_path)
    with pytest.raises(ValueError, match="5 train images are new: ant/7"):
        check_same_inputs(tmp_path, replace(apart, images=images))


def finish_a_trial(folder: Path) -> None:
    write_json(folder / "trials" / "t" / "result.json", {})


def test_until_a_trial_is_over_a_sweep_begins_anew(tmp_path: Path) -> None:
    check_same_inputs(tmp_path, inputs(dataset()))
    check_same_inputs(tmp_path, inputs(dataset(("aardvark", *NAMES))))
    assert read_json(tmp_path / "inputs.json")["classes"] == ["aardvark", *NAMES]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("ant", "ape", "bee"), "classes added: 'ape'"),
        (("ant",), "classes removed: 'bee'"),
        (("ant", "wasp"), "classes renamed: 'bee' is now 'wasp'"),
        (("bee", "ant"), "the same classes in another order"),
    ],
)
def test_other_classes_are_refused_by_name(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    check_same_inputs(tmp_path, inputs(dataset()))
    finish_a_trial(tmp_path)
    check_same_classes(tmp_path, NAMES)
    for check in (
        lambda: check_same_classes(tmp_path, names),
        lambda: check_same_inputs(tmp_path, inputs(dataset(names))),
    ):
        with pytest.raises(ValueError, match=message):
            check()


def test_other_images_encoders_and_sentences_are_refused_by_name(tmp_path: Path) -> None:
    data = dataset()
    given = inputs(data)
    check_same_inputs(tmp_path, given)
    finish_a_trial(tmp_path)
    check_same_inputs(tmp_path, given)
    train, val = paths(plan(data).choose()[3, 0])[0], data.val[0].path
    other = classifier_file("z")
    for changed, message in (
        (inputs(dataset(without=train)), rf"1 train images are no longer there: {train}; 1 train images are new: ant/"),
        (inputs(dataset(without=val)), rf"1 val images are no longer there: {val}"),
        (replace(given, identities={"clip": "CLIP-2"}), r"encoders\.clip: was CLIP-1, now CLIP-2"),
        (replace(given, classifiers={("clip", "file"): other}), "the sentences of clip, file: was s, now z"),
    ):
        with pytest.raises(ValueError, match=message):
            check_same_inputs(tmp_path, changed)
    content = given.images.features["val"]
    content = replace(content, contents=("other", *content.contents[1:]))
    images = replace(given.images, features={**given.images.features, "val": content})
    with pytest.raises(ValueError, match=rf"1 val images have another content: {val}"):
        check_same_inputs(tmp_path, replace(given, images=images))


def test_an_unreadable_image_that_is_deleted_is_no_difference(tmp_path: Path) -> None:
    data = dataset()
    bad_train, bad_val = paths(plan(data).choose()[3, 0])[0], data.val[0].path
    check_same_inputs(tmp_path, inputs(data, FakeStore(bad_train, bad_val)))
    finish_a_trial(tmp_path)
    check_same_inputs(tmp_path, inputs(dataset(without=bad_train), FakeStore(bad_val)))
    check_same_inputs(tmp_path, inputs(dataset(without=bad_val), FakeStore(bad_train)))


def test_equal_images_in_two_splits_or_classes_are_noted() -> None:
    images = [
        SweepImage("train", "ant", "1.png", "x"),
        SweepImage("val", "ant", "2.png", "x"),
        SweepImage("val", "bee", "3.png", "x"),
        SweepImage("val", "bee", "4.png", "y"),
    ]
    assert list(duplicate_notices(images)) == [
        "1 pairs of images are in train and in val by content: 1.png = 2.png",
        "1 pairs of images have the same content and two classes: 1.png = 3.png",
    ]
    test = [SweepImage("d's test", "bee", "5.png", "y"), SweepImage("d's test", "bee", "6.png", "z")]
    assert list(duplicate_notices(test, images)) == [
        "1 pairs of images are in val and in d's test by content: 4.png = 5.png"
    ]


def test_classes_without_a_key_are_noted() -> None:
    data = dataset()
    images = encode(plan(data), others=[plain_list("val", Path(), data.val)])
    few = FewShot(shots=2, seed=0, items=(data.train[0],), short={"bee": 0})
    given = replace(inputs(data), images=replace(images, choices={(2, 0): few}))
    assert list(given.notices()) == ["K=2, seed 0, K'=0: 1 classes have no key: bee"]


@pytest.mark.parametrize("content", ["", '{"trial": "t"', '{"no": 1}'])
def test_a_damaged_result_is_named_with_the_way_out(tmp_path: Path, content: str) -> None:
    trial = Trial(shots=1, seed=0, setting=Setting(0, 1, ("clip",), "average", "file", 1.0, 1, 1.0, 1.0))
    assert read_trial_result(trial, tmp_path) is None
    path = tmp_path / trial.name / "result.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(
        ValueError,
        match=r"result\.json(: malformed JSON| is not the result of a trial).*delete it, and the trial is run again",
    ):
        read_trial_result(trial, tmp_path)
