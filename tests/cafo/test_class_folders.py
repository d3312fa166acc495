"""Trees of class folders: what is an image, what is a class, and what is ignored, by name."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from cafo.class_folders import IMAGE_SUFFIXES, list_images
from cafo.image_trees import load_tree
from cafo.images import load_image


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")


def tree(root: Path, *more: str) -> Path:
    touch(root, *(f"{name}/{i}.png" for name in ("ant", "bee") for i in range(9)), *more)
    return root


def test_what_is_no_image_is_counted_and_named(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        *("ant/notes.txt", "ant/photo", "bee/a.heic", "bee/b.heic", "ant/more/1.png"),
        *("ant/.DS_Store", "bee/._1.png", "__MACOSX/ant/._1.png", ".cache/x.png", "stray.jpg"),
    )
    dataset = load_tree(root, seed=1)
    assert dataset.class_names == ("ant", "bee")
    assert len(dataset.train) + len(dataset.val) + len(dataset.open_test()) == 18
    assert sorted(dataset.notices) == [
        "1 folder in a class folder was ignored (images lie directly in their class's): ant/more",
        "1 image beside the class folders was ignored (no class is theirs): stray.jpg",
        "2 hidden files were ignored: ant/.DS_Store, bee/._1.png",
        "2 hidden or system folders were ignored: .cache, __MACOSX",
        "4 files without an image's suffix were ignored (.heic: 2, .txt: 1, none: 1): "
        "ant/notes.txt, ant/photo, bee/a.heic, bee/b.heic",
    ]
    assert load_tree(tree(tmp_path / "clean")).notices == ()


@pytest.mark.parametrize("stranger", ["train/cat/1.png", "docs/readme.md", "heics/1.heic"])
def test_a_class_folder_without_an_image_is_refused_by_name(tmp_path: Path, stranger: str) -> None:
    folder, entry, *_ = stranger.split("/")
    with pytest.raises(ValueError, match=rf"1 of 3 class folders have no image: {folder} \(holds {entry}\)"):
        load_tree(tree(tmp_path, stranger))


def test_every_raster_format_that_pillow_reads_is_an_image(tmp_path: Path) -> None:
    pixels = Image.fromarray(np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3))
    built_in = {".avif": "avif", ".webp": "webp", ".jp2": "jpg_2000"}
    kinds = {".jfif": "JPEG", ".jpe": "JPEG", ".tiff": "TIFF", ".webp": "WEBP", ".avif": "AVIF", ".jp2": "JPEG2000"}
    for suffix, kind in kinds.items():
        if suffix not in built_in or features.check(built_in[suffix]):
            pixels.save(tmp_path / f"x{suffix.upper()}", kind)
            assert load_image(tmp_path / f"x{suffix.upper()}").size == (7, 5)
    listed = list_images(tmp_path.parent, [tmp_path.name]).images[tmp_path.name]
    assert len(listed) >= 3
    assert sorted(listed) == sorted(path.name for path in tmp_path.iterdir())
    assert set(Image.registered_extensions()) >= IMAGE_SUFFIXES


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX systems alone")
def test_names_that_are_not_utf_8_are_named_and_do_not_stop_the_others(tmp_path: Path) -> None:
    root = tree(tmp_path)
    latin = os.fsencode(root / "ant") + b"/caf\xe9.png"
    Path(os.fsdecode(latin)).write_bytes(b"")
    dataset = load_tree(root)
    assert dataset.notices == (r"1 image whose name is not UTF-8 was ignored (rename them): ant/caf\xe9.png",)
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9")).mkdir()
    with pytest.raises(ValueError, match=r"class folder caf\\xe9 is not UTF-8"):
        load_tree(root)
