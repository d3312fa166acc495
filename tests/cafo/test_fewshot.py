import itertools
import random

import pytest

from cafo import fewshot
from cafo.items import Item

NAMES = ("ant", "bee", "cat")
ITEMS = [Item(f"{name}/{i}.jpg", label, name) for label, name in enumerate(NAMES) for i in range(11 + label)]


def test_the_choice_does_not_depend_on_file_order():
    chosen = fewshot.choose(ITEMS, NAMES, shots=5, seed=1)
    shuffled = random.Random(0).sample(ITEMS, len(ITEMS))
    assert fewshot.choose(shuffled, NAMES, shots=5, seed=1) == chosen
    assert [item.label for item in chosen.items] == [0] * 5 + [1] * 5 + [2] * 5
    assert len(set(chosen.items)) == 15
    assert fewshot.choose(ITEMS, NAMES, shots=5, seed=2) != chosen


def test_choices_nest_and_zero_is_allowed():
    choices = [set(fewshot.choose(ITEMS, NAMES, shots=k, seed=7).items) for k in (0, 1, 2, 4, 8)]
    assert choices[0] == set()
    assert all(a < b for a, b in itertools.pairwise(choices))


def test_a_short_class_is_reported_and_never_repeated():
    with pytest.raises(ValueError, match=r"ant \(11\)"):
        fewshot.choose(ITEMS, NAMES, shots=12, seed=0)
    chosen = fewshot.choose(ITEMS + ITEMS, (*NAMES, "dog"), shots=12, seed=0, short="report")
    assert chosen.short == {"ant": 11, "dog": 0}
    assert len(chosen.items) == len(set(chosen.items)) == 11 + 12 + 12


def test_a_saved_choice_is_read_back_equal(tmp_path):
    chosen = fewshot.choose(ITEMS, (*NAMES, "dog"), shots=3, seed=9, short="report")
    fewshot.save(chosen, tmp_path / "run" / "few_shot.json")
    path = tmp_path / "run" / "few_shot.json"
    assert fewshot.load(path, (*NAMES, "dog")) == chosen
    names = ("ape", *reversed((*NAMES, "dog")))  # a class added, and the others in another order
    moved = fewshot.load(path, names)
    assert {(item.path, item.class_name) for item in moved.items} == {(i.path, i.class_name) for i in chosen.items}
    assert all(names[item.label] == item.class_name for item in moved.items)
    with pytest.raises(ValueError, match="has images of ant, and the class list has no such class"):
        fewshot.load(path, [name for name in names if name != "ant"])
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["few_shot.json"]
    (tmp_path / "bad.json").write_text('{"shots": 1}')
    with pytest.raises(ValueError, match="not a few-shot choice"):
        fewshot.load(tmp_path / "bad.json", NAMES)
    with pytest.raises(ValueError, match="no file"):
        fewshot.load(tmp_path / "none.json", NAMES)


def test_an_unreadable_image_gives_way_to_the_next_of_its_class():
    before = fewshot.choose(ITEMS, NAMES, shots=3, seed=1)
    more = fewshot.choose(ITEMS, NAMES, shots=4, seed=1)
    bad = before.items[4]  # the second bee
    after = fewshot.choose(ITEMS, NAMES, shots=3, seed=1, unreadable={bad.path})
    assert [item for item in after.items if item.label != 1] == [item for item in before.items if item.label != 1]
    bees = [item for item in more.items if item.label == 1]
    assert [item for item in after.items if item.label == 1] == [bees[0], *bees[2:]]
    with pytest.raises(ValueError, match=r"ant \(10\).*images of these classes that cannot be read: ant/0\.jpg"):
        fewshot.choose(ITEMS, NAMES, shots=11, seed=1, unreadable={"ant/0.jpg"})
