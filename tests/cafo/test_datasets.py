import json

import pytest

from cafo.dataset_layouts import LAYOUTS
from cafo.datasets import load_split
from cafo.paper_datasets import load_dataset, load_generated


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")


def coop(tmp_path, **parts):
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "split.json").write_text(json.dumps(parts))
    return tmp_path / "split.json", tmp_path / "images"


PARTS = {
    "train": [["a/1.jpg", 0, "ant"], ["b/1.jpg", 1, "bee"], ["c/1.jpg", 2, "cat"]],
    "val": [["a/2.jpg", 0, "ant"]],
    "test": [["b/3.jpg", 1, "bee"]],
}


def test_the_table_is_the_papers_eleven():
    assert len(LAYOUTS) == 11
    assert all(template.count("{}") == 1 for layout in LAYOUTS.values() for template in layout.templates)
    assert len(LAYOUTS["imagenet"].templates) == 7


def test_a_split_file(tmp_path):
    dataset = load_split(*coop(tmp_path, **PARTS))
    assert dataset.class_names == ("ant", "bee", "cat")
    assert dataset.train[1] == ("b/1.jpg", 1, "bee")
    assert len(dataset.val) == 1
    assert dataset.open_test() == (("b/3.jpg", 1, "bee"),)


def test_only_open_test_reads_the_test_list(tmp_path):
    for test in ([["nonsense"]], None):
        dataset = load_split(*coop(tmp_path, **{**PARTS, "test": test}))
        assert len(dataset.train) == 3
        with pytest.raises(ValueError, match="test"):
            dataset.open_test()
    dataset = load_split(*coop(tmp_path, train=PARTS["train"], val=[]))
    with pytest.raises(ValueError, match="no test list"):
        dataset.open_test()


def test_the_class_list_is_wider_than_the_labels_that_occur(tmp_path):
    names = ("ant", "bee", "cat", "dog")
    assert load_split(*coop(tmp_path, **PARTS), class_names=names).class_names == names
    stranger = {**PARTS, "test": [["d/1.jpg", 3, "dog"]]}
    with pytest.raises(ValueError, match="beyond the 3 classes"):
        load_split(*coop(tmp_path, **stranger)).open_test()


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([["a/1.jpg", "0", "ant"]], "entry 0"),
        ([["a/1.jpg", 0, "ant"], ["a/2.jpg", 0, "bee"]], "two names"),
        ([["a/1.jpg", 0, "ant"], ["c/1.jpg", 2, "cat"]], "label 1"),
        ({"a": 1}, "list of"),
        ([], "no train"),
    ],
)
def test_malformed_splits_say_where(tmp_path, train, message):
    with pytest.raises(ValueError, match=message):
        load_split(*coop(tmp_path, train=train, val=[]))


def test_missing_things_are_named(tmp_path):
    with pytest.raises(ValueError, match="caltech-101"):
        load_dataset("caltech101", tmp_path)
    with pytest.raises(ValueError, match="there are imagenet"):
        load_dataset("cifar", tmp_path)
    (tmp_path / "caltech-101" / "101_ObjectCategories").mkdir(parents=True)
    with pytest.raises(ValueError, match="split_zhou_Caltech101"):
        load_dataset("caltech101", tmp_path)
    (tmp_path / "caltech-101" / "split_zhou_Caltech101.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_dataset("caltech101", tmp_path)


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.split])
def test_every_coop_set_is_found_where_the_paper_keeps_it(tmp_path, name):
    layout = LAYOUTS[name]
    touch(tmp_path, f"{layout.folder}/{layout.images}/a/1.jpg")
    (tmp_path / layout.folder / layout.split).write_text(json.dumps(PARTS))
    dataset = load_dataset(name, tmp_path)
    assert dataset.name == name
    assert (dataset.image_root / dataset.train[0].path).is_file()


def test_aircraft_reads_its_own_lists(tmp_path):
    folder = tmp_path / "fgvc_aircraft"
    touch(folder, "images/0034309.jpg")
    (folder / "variants.txt").write_text("707-320\nBoeing 717\nDC-3\n")
    (folder / "images_variant_train.txt").write_text("0034309 Boeing 717\n0034958 707-320\n")
    (folder / "images_variant_val.txt").write_text("0034310 707-320\n")
    dataset = load_dataset("fgvc_aircraft", tmp_path)
    assert dataset.class_names == ("707-320", "Boeing 717", "DC-3")
    assert dataset.train[0] == ("0034309.jpg", 1, "Boeing 717")
    with pytest.raises(ValueError, match="images_variant_test"):
        dataset.open_test()
    (folder / "images_variant_test.txt").write_text("1 Concorde\n")
    with pytest.raises(ValueError, match="line 1: 'Concorde'"):
        dataset.open_test()


def imagenet(root):
    touch(root, "imagenet/classnames.txt")
    (root / "imagenet/classnames.txt").write_text("n02 great white shark\nn01 tench\n")
    touch(root, *(f"imagenet/images/train/{w}/{i}.JPEG" for w in ("n01", "n02") for i in range(40)))
    touch(root, "imagenet/images/val/n01/v.JPEG")


def test_imagenet_carves_val_from_train(tmp_path):
    imagenet(tmp_path)
    dataset = load_dataset("imagenet", tmp_path, val_share=0.25)
    assert dataset.class_names == ("great white shark", "tench")
    assert len(dataset.train) + len(dataset.val) == 80
    assert 5 < len(dataset.val) < 40
    assert not {*dataset.train} & {*dataset.val}
    assert dataset.open_test() == (("val/n01/v.JPEG", 1, "tench"),)
    assert all(item.label == 0 for item in dataset.train if "n02" in item.path)


def test_shift_targets_are_test_only(tmp_path):
    imagenet(tmp_path)
    touch(tmp_path, "imagenetv2/imagenetv2-matched-frequency-format-val/1/x.jpeg", "imagenet-sketch/images/n02/s.JPEG")
    v2, sketch = (load_dataset(name, tmp_path) for name in ("imagenet_v2", "imagenet_sketch"))
    assert v2.train == v2.val == sketch.train == ()
    assert v2.open_test() == (("1/x.jpeg", 1, "tench"),)
    assert sketch.open_test() == (("n02/s.JPEG", 0, "great white shark"),)


def test_generated_images_are_a_second_source(tmp_path):
    touch(tmp_path, "caltech-101/101_ObjectCategories/a/1.jpg", "dalle_caltech-101/x.jpg", "sd_caltech_101/y.jpg")
    (tmp_path / "caltech-101/split_zhou_Caltech101.json").write_text(json.dumps(PARTS))
    dataset = load_dataset("caltech101", tmp_path)
    with pytest.raises(ValueError, match="found none"):
        load_generated(dataset, tmp_path)
    (tmp_path / "dalle_caltech-101/dalle_caltech.json").write_text(json.dumps({"train": [["x.jpg", 1, "bee"]]}))
    assert load_generated(dataset, tmp_path) == (tmp_path / "dalle_caltech-101", (("x.jpg", 1, "bee"),))
    (tmp_path / "sd_caltech_101/sd_caltech.json").write_text(json.dumps({"train": [["y.jpg", 2, "bee"]]}))
    with pytest.raises(ValueError, match="'cat' in the class list"):
        load_generated(dataset, tmp_path, "sd")


def test_caltech101_as_coop_lays_it_out(caltech):
    dataset = load_dataset("caltech101", caltech)
    assert (len(dataset.class_names), len(dataset.train), len(dataset.val)) == (4, 32, 16)
    assert len(dataset.open_test()) == 24
    assert all((dataset.image_root / item.path).is_file() for item in dataset.train)
