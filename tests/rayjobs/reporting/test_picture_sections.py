"""Sections of pictures: pairs stay pairs, what cannot be read is left out, a damaged list is told."""

from pathlib import Path

import pytest
from PIL import Image

from rayjobs.reporting.html import Fold, Page, write_page
from rayjobs.reporting.picture_sections import (
    PICTURES,
    SIDE,
    Picture,
    PictureSection,
    read_picture_sections,
    write_picture_sections,
)


def test_pictures_come_back_with_their_captions(tmp_path: Path) -> None:
    red, tall, bad = tmp_path / "red.png", tmp_path / "tall.png", tmp_path / "bad.png"
    Image.new("RGB", (400, 100), "red").save(red)
    Image.new("RGB", (30, 60), "blue").save(tall)
    bad.write_bytes(b"no image")
    pairs = [Picture((red, tall), "red & <blue>"), Picture((red, bad), "half of it is gone")]
    sections = [
        PictureSection(title="pairs", pictures=pairs, note="two at a time"),
        PictureSection(title="one", pictures=[Picture((tall,), "blue"), Picture((tmp_path / "gone.png",), "gone")]),
        PictureSection(title="none", pictures=[]),
    ]
    write_picture_sections(tmp_path / "run", sections)
    found = list(read_picture_sections(tmp_path / "run"))
    assert [(g.title, g.note, g.wide, [c for _, c in g.images]) for g in found] == [
        ("pairs", "two at a time", True, ["red & <blue>"]),
        ("one", "", False, ["blue"]),
    ]
    with Image.open(tmp_path / "run" / "pictures" / "00-00.jpg") as pair:
        assert pair.size == (2 * SIDE, 60)
        assert pair.getpixel((20, 30))[0] > 200 > 100 > pair.getpixel((20, 30))[2]
        assert pair.getpixel((SIDE + SIDE // 2, 30))[2] > 200
    page = write_page(tmp_path / "page.html", Page(title="t", sections=found)).read_text()
    assert page.count('class="gallery wide"') == 1
    assert 'alt="red &amp; &lt;blue&gt;"' in page


def test_sections_of_a_group_are_folded_together_behind_the_others(tmp_path: Path) -> None:
    Image.new("RGB", (30, 60), "blue").save(tmp_path / "blue.png")
    picture = Picture((tmp_path / "blue.png",), "blue")
    groups = {"cat": "by class", "dog": "by class", "all": ""}
    sections = [PictureSection(title=title, pictures=[picture], group=group) for title, group in groups.items()]
    write_picture_sections(tmp_path / "run", sections)
    first, fold = read_picture_sections(tmp_path / "run")
    assert (first.title, fold.title) == ("all", "by class")
    assert isinstance(fold, Fold)
    assert [section.title for section in fold.sections] == ["cat", "dog"]


def test_a_damaged_list_is_told(tmp_path: Path) -> None:
    assert list(read_picture_sections(tmp_path)) == []
    (tmp_path / PICTURES).write_text('[{"title": "x"}]')
    with pytest.raises(ValueError, match=r"pictures\.json is no list of sections of pictures"):
        list(read_picture_sections(tmp_path))
