"""Images found in every kind of source and read from it: each once, by its name; broken ones with their reasons."""

import csv
import gzip
import http.server
import io
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cafo.images import Preprocess, load_image
from rayjobs.config import load
from rayjobs.data import image_reading
from rayjobs.data.image_collection import Collection, ImageCollectionConfig
from rayjobs.data.image_reading import Unit, read_pixels
from rayjobs.errors import ConfigError, DataError
from rayjobs.storage.files import read_json

KINDS = [Preprocess(size=7, resize=11), Preprocess(size=5, resize=5, mode="squash")]


def png(number: int) -> bytes:
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 100, (13 + number, 17, 3), np.uint8) + rng.integers(0, 155, 3, np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for number in range(5):
        file = folder / ("cats" if number % 2 else "dogs and cats") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number))
    (folder / "notes.txt").write_text("no image")
    (folder / "labels.csv").write_text("path\nnothing.png\n")
    (folder / ".hidden.png").write_bytes(png(9))
    return folder


def find(*paths: Path | str, **settings) -> Collection:
    return load(ImageCollectionConfig, {"path": [str(path) for path in paths], **settings}).find()


def read(found: Collection, folder: Path, per_shard: int = 100, done: tuple[int, ...] = ()) -> list[dict]:
    units = [Unit(images=tuple(found.images))] if found.images else []
    units += [Unit(container=container, state="x", done=done) for container in found.containers]
    tables = [pa.table({"unit": [Unit.from_json(unit.to_json()).to_json()]}) for unit in units]
    return [row for table in tables for made in read_pixels(table, KINDS, per_shard, str(folder))
            for row in made.to_pylist()]  # fmt: skip


def check_pixels(row: dict, numbers: list[int]) -> None:
    """The pixels are those of the plain views, of each preprocessing."""
    for i, kind in enumerate(KINDS):
        pixels = np.frombuffer(row[f"pixels{i}"], np.uint8).reshape(len(numbers), kind.size, kind.size, 3)
        expected = [np.asarray(kind.crop(load_image(png(number)))) for number in numbers]
        np.testing.assert_array_equal(pixels, np.stack(expected))


def test_folders_and_patterns_name_images_by_their_place(photos: Path, tmp_path: Path) -> None:
    found = find(photos)
    assert [image.path for image in found.images] == [
        "cats/1.png", "cats/3.png", "dogs and cats/0.png", "dogs and cats/2.png", "dogs and cats/4.png",
    ]  # fmt: skip
    assert {image.source for image in found.images} == {str(photos)}
    assert found.describe() == "5 images; 2 other files are ignored (.csv: 1, .txt: 1)"
    assert "(.csv: 1, .txt: 1)" in Collection(ignored=Counter([".txt", ".csv"])).describe()
    pattern = find(f"{photos}/**/[13].png", photos / "cats" / "1.png", photos / "cats" / "1.png")
    assert [(i.source, i.path) for i in pattern.images] == [
        (str(photos), "cats/1.png"), (str(photos), "cats/3.png"), (str(photos / "cats"), "1.png"),
    ]  # fmt: skip
    (photos / "cats" / "3.png").write_bytes(png(3)[:60])
    (photos / "cats" / "1.png").unlink()
    (row,) = read(found, tmp_path)
    assert row["paths"] == ["dogs and cats/0.png", "dogs and cats/2.png", "dogs and cats/4.png"]
    check_pixels(row, [0, 2, 4])
    (gone, broken) = image_reading.json.loads(row["rejected"])
    assert gone[:2] == [str(photos), "cats/1.png"]
    assert "FileNotFoundError" in gone[2]
    assert "cannot be decoded" in broken[2]


def test_lists_name_files_and_urls(photos: Path, tmp_path: Path) -> None:
    with (tmp_path / "list.tsv").open("w", newline="") as file:
        rows = [["id", "file"], [1, "photos/cats/3.png"], [2, ""], [3, str(photos / "cats" / "1.png")]]
        csv.writer(file, delimiter="\t").writerows(rows)
    found = find(tmp_path / "list.tsv")
    assert [(i.source, i.path) for i in found.images] == [
        (str(tmp_path / "list.tsv"), "photos/cats/3.png"),
        (str(tmp_path / "list.tsv"), str(photos / "cats" / "1.png")),
    ]
    assert found.rejected == [(str(tmp_path / "list.tsv"), "line 3", "it names no image")]
    check_pixels(read(found, tmp_path)[0], [3, 1])
    pq.write_table(pa.table({"n": [1, 2], "url": ["1.png", "3.png"]}), tmp_path / "paths.parquet")
    check_pixels(read(find(tmp_path / "paths.parquet", root=str(photos / "cats")), tmp_path)[0], [1, 3])


@pytest.fixture
def site(photos: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        failed: list[str] = []  # noqa: RUF012 - shared by the requests of a test

        def do_GET(self) -> None:
            if "2.png" in self.path and self.path not in self.failed:  # fails once
                self.failed.append(self.path)
                self.send_error(503)
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(photos)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_urls_are_fetched_and_tried_again(site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_reading, "_FIRST_PAUSE_S", 0.0)
    names = ["dogs%20and%20cats/2.png", "cats/1.png?size=3&token=secret", "cats/none.png"]
    (tmp_path / "urls.csv").write_text("url\n" + "".join(f"{site}/{name}\n" for name in names))
    found = find(tmp_path / "urls.csv", f"{site}/cats/3.png")
    (row,) = read(found, tmp_path)
    assert row["paths"] == [f"{site}/{names[0]}", f"{site}/cats/1.png?size=3&token=***", "3.png"]
    assert row["sources"][2] == f"{site}/cats"
    check_pixels(row, [2, 1, 3])
    assert image_reading.json.loads(row["rejected"]) == [
        [str(tmp_path / "urls.csv"), f"{site}/cats/none.png", "cannot be fetched (FileNotFoundError)"]
    ]


def test_rows_of_bytes_are_read_group_by_group(tmp_path: Path) -> None:
    images = [{"bytes": png(n), "path": f"{n}.png"} for n in range(7)]
    images[4]["bytes"] = None
    pq.write_table(pa.table({"label": range(7), "image": images}), tmp_path / "a.parquet", row_group_size=5)
    found = find(tmp_path)
    assert [(c.first, c.images, c.image_column) for c in found.containers] == [(0, 5, "image"), (5, 2, "image")]
    shards = read(found, tmp_path, per_shard=3)
    assert [row["paths"] for row in shards] == [["row 0", "row 1", "row 2"], ["row 3"], ["row 5", "row 6"]]
    check_pixels(shards[2], [5, 6])
    assert image_reading.json.loads(shards[1]["rejected"]) == [
        [str(tmp_path / "a.parquet"), "row 4", "its row has no bytes"]
    ]
    assert [row["name"] for row in read(found, tmp_path, per_shard=3, done=(0,))] == [shards[1]["name"]]
    pq.write_table(pa.table({"x": [png(n) for n in range(2)], "name": ["a", "b"]}), tmp_path / "b.parquet")
    (row,) = read(find(tmp_path / "b.parquet", columns={"path": "name"}), tmp_path)
    assert row["paths"] == ["a", "b"]


def write_tar(path: Path, numbers: list[int]) -> None:
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            for ending, content in ((".png", png(number)), (".cls", b"3")):
                member = tarfile.TarInfo(f"{number:04d}{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_tars_are_read_shard_by_shard(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", list(range(5)))
    found = find(f"{tmp_path}/*.tar")
    shards = read(found, tmp_path / "counts", per_shard=2)
    assert [row["paths"] for row in shards] == [["0000.png", "0001.png"], ["0002.png", "0003.png"], ["0004.png"]]
    check_pixels(shards[1], [2, 3])
    (count,) = (tmp_path / "counts").iterdir()
    assert read_json(count) == {"images": 5}
    assert [row["name"] for row in read(found, tmp_path, per_shard=2, done=(0, 2))] == [shards[1]["name"]]
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "1.tar.gz").write_bytes(gzip.compress(whole))
    assert [row["paths"] for row in read(find(tmp_path / "1.tar.gz"), tmp_path, 9)] == [
        [f"{n:04d}.png" for n in range(5)]
    ]
    for name, content in (
        ("2.tar", whole[:3000]),
        ("3.tgz", gzip.compress(whole, 0)[:3000]),
        ("4.tar", b"nothing" * 99),
    ):
        (tmp_path / name).write_bytes(content)
        (row,) = read(find(tmp_path / name), tmp_path)
        (rest,) = image_reading.json.loads(row["rejected"])
        assert rest[1] == f"after image {len(row['paths'])}"
        assert "cut short or damaged" in rest[2]
        assert len(row["paths"]) == (0 if name == "4.tar" else 1)


def test_what_cannot_be_a_source_is_told(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.csv").write_text("what,where\n1,2\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    pq.write_table(pa.table({"n": [1]}), tmp_path / "numbers.parquet")
    for path, error, message in (
        (tmp_path / "none", DataError, "no such file or folder"),
        (tmp_path / "empty", DataError, "has no image, list, Parquet file or tar"),
        (f"{tmp_path}/*.jpg", DataError, "has no image"),
        (photos / "notes.txt", ConfigError, "is no image, folder, list"),
        (tmp_path / "list.csv", ConfigError, "set data.columns.path to one of what, where"),
        (tmp_path / "bad.parquet", DataError, "is no whole Parquet file"),
        (tmp_path / "numbers.parquet", ConfigError, "its columns, of which it has none"),
        ("hf://datasets/some/photos", ConfigError, "download it first"),
    ):
        with pytest.raises(error, match=message):
            find(path)
    with pytest.raises(ConfigError, match=r"data\.columns\.path is 'x'; .* has what, where"):
        find(tmp_path / "list.csv", columns={"path": "x"})
