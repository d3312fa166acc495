"""The files of a source: patterns, folders with splits, saved data sets, and data sets on the hub."""

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from PIL import Image

from cafo.errors import ImageError
from rayjobs.config import load
from rayjobs.data.image_source import read_image
from rayjobs.data.records import DataConfig, Source
from rayjobs.errors import ConfigError, DataError, StorageError
from rayjobs.storage.counted_reader import CountedReader
from tests.hub_server import Hub, serve_hub, use_hub


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write(folder: Path, *names: str) -> Path:
    """Files of one record each, whose text is the file's name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(lines(name))
    return folder


def source(path: Any, **more: Any) -> Source:
    return load(DataConfig, {"path": path, **more}).sources()[0]


def texts(source: Source) -> list[str]:
    return [record["text"] for record in source.read()]


def test_a_path_may_be_text_a_list_or_settings(tmp_path: Path) -> None:
    file = str(write(tmp_path, "a.jsonl") / "a.jsonl")
    for path in (file, [file], {"path": file}, [{"path": file}]):
        assert texts(source(path)) == ["a.jsonl"]
    both = load(DataConfig, {"path": file, "val_path": file})
    assert [texts(source) for source in (*both.sources(), *both.val_sources())] == [["a.jsonl"]] * 2
    assert texts(load(DataConfig, overrides=[f"path={file}"]).sources()[0]) == ["a.jsonl"]


def test_patterns_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", "a.jsonl", "c.txt", "deep/er/a.jsonl", "deep/d.jsonl")
    assert texts(source(f"{tmp_path}/*.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert texts(source(f"{tmp_path}/[b-z].jsonl")) == ["b.jsonl"]
    deep = source(f"{tmp_path}/**/*.jsonl")
    assert texts(deep) == ["a.jsonl", "b.jsonl", "deep/d.jsonl", "deep/er/a.jsonl"]
    assert deep.images == str(tmp_path)
    assert next(deep.read())["place"] == "a.jsonl, record 1"
    with pytest.raises(DataError, match=r"none\*\.jsonl: no file of records; expected \.json, \.jsonl"):
        texts(source(f"{tmp_path}/none*.jsonl"))
    write(tmp_path, "[b-z].jsonl")
    assert texts(source(f"{tmp_path}/[b-z].jsonl")) == ["[b-z].jsonl"]  # a file of that name is no pattern


def test_a_folder_is_read_whole_without_what_is_hidden_or_about_it(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", "a/c.jsonl", ".git/x.jsonl", "__pycache__/x.jsonl", "dataset_infos.json", "notes.md")
    folder = source(str(tmp_path))
    assert texts(folder) == ["a/c.jsonl", "b.jsonl"]
    assert (folder.images, folder.split) == (str(tmp_path), "")
    assert folder.describe() == f"{tmp_path}, 2 files: text"
    with pytest.raises(DataError, match="no split 'test'; its splits are none"):
        texts(source({"path": str(tmp_path), "split": "test"}))
    with pytest.raises(DataError, match="split='test' is given, but only a folder has splits"):
        texts(source({"path": str(tmp_path / "b.jsonl"), "split": "test"}))
    with pytest.raises(DataError, match="no such file or folder; expected"):
        texts(source(str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no file of records"):
        texts(source(str(tmp_path / "empty")))


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (["train.jsonl", "test.jsonl", "validation.jsonl"], ["train.jsonl"], ["validation.jsonl"]),
        (["data/train-0.jsonl", "data/train-1.jsonl", "data/dev_0.jsonl", "labels.jsonl"], 2, ["data/dev_0.jsonl"]),
        (["Train/a.jsonl", "Train/b.jsonl", "val/latest.jsonl"], ["Train/a.jsonl", "Train/b.jsonl"], 1),
        (["my.training.jsonl", "my.eval.jsonl", "my.testing.jsonl"], ["my.training.jsonl"], ["my.eval.jsonl"]),
    ],
)
def test_names_of_files_and_folders_say_the_split(tmp_path: Path, names: list[str], train: Any, val: Any) -> None:
    folder = str(write(tmp_path, *names))
    config = load(DataConfig, {"path": folder, "val_path": folder})
    for read, expected in ((config.sources()[0], train), (config.val_sources()[0], val)):
        assert texts(read) == expected if isinstance(expected, list) else len(texts(read)) == expected
    assert texts(source({"path": folder, "split": "dev"})) == texts(config.val_sources()[0])


def test_a_split_that_is_not_there_is_not_replaced_by_another(tmp_path: Path) -> None:
    write(tmp_path, "test.jsonl", "dev.jsonl")
    with pytest.raises(DataError, match=r"no split 'train'; its splits are val, test: name one, as \{path: …, split"):
        texts(source(str(tmp_path)))
    assert texts(source({"path": str(tmp_path), "split": "test"})) == ["test.jsonl"]


def test_a_part_that_is_missing_is_no_smaller_data_set(tmp_path: Path) -> None:
    write(tmp_path, *[f"train-0000{i}-of-00003.jsonl" for i in range(3)], "test-00000-of-00001.jsonl")
    assert len(texts(source(str(tmp_path)))) == 3
    (tmp_path / "train-00001-of-00003.jsonl").unlink()
    with pytest.raises(DataError, match=r"train-…-of-00003\.jsonl: 2 of 3 parts are there; fetch the others"):
        texts(source(str(tmp_path)))
    assert len(texts(source(f"{tmp_path}/train-*"))) == 2


def save_like_datasets(folder: Path, *files: list[str]) -> None:
    """A folder as `datasets.Dataset.save_to_disk` leaves it, with a file of its cache beside."""
    folder.mkdir(parents=True)
    names = [f"data-0000{i}-of-0000{len(files)}.arrow" for i in range(len(files))]
    for name, said in zip([*names, "cache-1f.arrow"], [*files, ["cached"]], strict=True):
        table = pa.table({"text": said})
        with pa.ipc.new_stream(str(folder / name), table.schema) as file:
            file.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "1f", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    save_like_datasets(tmp_path / "one", ["a", "b", "c"], ["d"])
    assert texts(source(str(tmp_path / "one"))) == ["a", "b", "c", "d"]
    save_like_datasets(tmp_path / "two" / "train", ["a"])
    save_like_datasets(tmp_path / "two" / "validation", ["b"])
    (tmp_path / "two" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    config = load(DataConfig, {"path": str(tmp_path / "two"), "val_path": str(tmp_path / "two")})
    assert (texts(config.sources()[0]), texts(config.val_sources()[0])) == (["a"], ["b"])
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"one: data-00001-of-00002\.arrow, which state\.json names, is missing"):
        texts(source(str(tmp_path / "one")))
    (tmp_path / "one" / "state.json").write_text("[]")
    with pytest.raises(DataError, match=r"state\.json: not the state of a saved data set"):
        texts(source(str(tmp_path / "one")))


CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train_sft
    path: data/train_sft-*
  - split: test
    path: [data/test*, more/*.jsonl]
---
# A data set
"""


def test_the_card_of_a_folder_declares_its_splits(tmp_path: Path) -> None:
    write(
        tmp_path,
        "data/train_sft-0.jsonl",
        "data/train_gen-0.jsonl",
        "data/test-0.jsonl",
        "more/x.jsonl",
        "more/y/z.jsonl",
    )
    (tmp_path / "README.md").write_text(CARD)
    assert texts(source({"path": str(tmp_path), "split": "train_sft"})) == ["data/train_sft-0.jsonl"]
    assert texts(source({"path": str(tmp_path), "split": "test"})) == ["data/test-0.jsonl", "more/x.jsonl"]
    with pytest.raises(DataError, match="no split 'train'; its splits are train_sft, test"):
        texts(source(str(tmp_path)))
    two = "---\nconfigs:\n- config_name: a\n  data_files: data/test*\n- config_name: b\n  data_dir: more\n---\n"
    (tmp_path / "README.md").write_text(two)
    with pytest.raises(ConfigError, match=r"several subsets, of which one must be named by its files: a: data/test\*"):
        texts(source(str(tmp_path)))
    (tmp_path / "README.md").write_text(two.replace("b\n", "b\n  default: true\n"))
    assert texts(source(str(tmp_path))) == ["more/x.jsonl", "more/y/z.jsonl"]
    for text in ("---\n: [\n---\n", "---\nconfigs: 3\n---\n", "no header", "---\nlicense: mit\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert len(texts(source({"path": str(tmp_path), "split": "train"}))) == 2


def test_digests_cover_every_file_by_content_and_not_by_name(tmp_path: Path) -> None:
    write(tmp_path, "x/a.jsonl", "x/b.jsonl")
    write(tmp_path, "y/a.jsonl")
    (tmp_path / "y" / "b.jsonl").write_bytes(lines("x/b.jsonl"))
    (tmp_path / "y" / "a.jsonl").write_bytes(lines("x/a.jsonl"))
    before = source(str(tmp_path / "x")).digests()
    assert len(set(before)) == 2
    assert source(f"{tmp_path}/y/*").digests() == before
    (tmp_path / "y" / "b.jsonl").write_bytes(lines("other"))
    assert source(f"{tmp_path}/y/*").digests()[0] == before[0] != source(f"{tmp_path}/y/*").digests()[1]


def test_the_files_are_found_once_and_sent_along(tmp_path: Path) -> None:
    import pickle

    write(tmp_path, "a.jsonl")
    found = source(str(tmp_path))
    assert len(found.files) == 1
    sent = pickle.dumps(found)
    write(tmp_path, "b.jsonl")
    assert texts(pickle.loads(sent)) == ["a.jsonl"]
    assert texts(source(str(tmp_path))) == ["a.jsonl", "b.jsonl"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with serve_hub() as hub:
        use_hub(hub.url, str(tmp_path / "home"), monkeypatch)
        yield hub


def parquet(path: Path, *said: str) -> bytes:
    pq.write_table(pa.table({"text": list(said)}), path)
    return path.read_bytes()


def test_a_data_set_on_the_hub_by_its_id(hub: Hub, tmp_path: Path) -> None:
    rows = parquet(tmp_path / "p", *[f"t{i}" for i in range(300)])
    first = hub.add("org/talks", {"data/train-00000-of-00001.parquet": rows, "test.jsonl": lines("x")}, kind="dataset")
    read = source("org/talks")
    assert read.path == "hf://datasets/org/talks"
    assert texts(read) == [f"t{i}" for i in range(300)]
    assert read.files == [f"hf://datasets/org/talks@{first}/data/train-00000-of-00001.parquet"]
    assert "test.jsonl" not in hub.fetched()
    second = hub.repos["dataset", "org/talks"].commit({"test.jsonl": lines("y")})
    assert texts(source("hf://datasets/org/talks@v1/test.jsonl")) == ["x"]
    assert texts(source({"path": f"org/talks@{second}", "split": "test"})) == ["y"]
    assert texts(source({"path": f"org/talks@{first}", "split": "test"})) == ["x"]
    assert texts(source("hf://datasets/org/talks/*.jsonl")) == ["y"]
    assert len(texts(source("hf://datasets/org/talks/data"))) == 300
    here, there = write(tmp_path, "y") / "y", source("hf://datasets/org/talks/test.jsonl")
    here.write_bytes(lines("y"))
    here.rename(tmp_path / "y.jsonl")
    assert there.digests() == source(str(tmp_path / "y.jsonl")).digests()


def test_a_card_on_the_hub(hub: Hub) -> None:
    files = {"README.md": CARD.encode(), "data/train_sft-0.jsonl": lines("s"), "data/train_gen-0.jsonl": lines("g")}
    hub.add("org/chats", files, kind="dataset")
    assert texts(source({"path": "org/chats", "split": "train_sft"})) == ["s"]
    assert "data/train_gen-0.jsonl" not in hub.fetched()


def test_images_of_a_data_set_on_the_hub(hub: Hub) -> None:
    pixels = io.BytesIO()
    Image.new("RGB", (5, 7)).save(pixels, "PNG")
    record = {"instruction": "i", "output": "o", "image": "img/a.png"}
    hub.add("org/pictures", {"a.jsonl": json.dumps(record).encode(), "img/a.png": pixels.getvalue()}, kind="dataset")
    read = source("org/pictures")
    assert read.image_paths() == ["img/a.png"]
    assert read_image(read.images, "img/a.png", CountedReader()).size == (5, 7)
    with pytest.raises(ImageError, match=r"img/b\.png: no such file in hf://datasets/org/pictures"):
        read_image(read.images, "img/b.png", CountedReader())


def test_what_the_hub_does_not_have(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.add("org/talks", {"train.jsonl": lines("x")}, kind="dataset")
    with pytest.raises(StorageError, match=r"hf://datasets/org/nowhere: the hub, .*, has no such data set, or"):
        texts(source("org/nowhere"))
    with pytest.raises(StorageError, match="no revision v7"):
        texts(source("org/talks@v7"))
    with pytest.raises(
        ConfigError, match="hf://org/talks names a model on the hub; a data set is hf://datasets/org/na"
    ):
        source("hf://org/talks")
    assert texts(source("org/talks")) == ["x"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert texts(source("org/talks")) == ["x"]
    assert not hub.requests
    with pytest.raises(StorageError, match="HF_HUB_OFFLINE forbids"):
        texts(source("org/nowhere"))


def test_what_is_spelled_like_a_local_path_is_none_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("data/alpaca.json", "./data/alpaca", "data/a.jsonl.gz", "a/b/c", "name", "../org/name"):
        assert source(path).path == str((tmp_path / path).resolve())
    assert source("org/name").path == "hf://datasets/org/name"
    (tmp_path / "org").mkdir()
    assert source("org/name").path == str(tmp_path / "org" / "name")  # a misspelt name of a folder that is here


def test_patterns_and_folders_at_urls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = fsspec.filesystem("memory")
    for name in ("data/train/b.jsonl", "data/train/a.jsonl.gz", "data/test/c.jsonl", "data/README.txt"):
        content = gzip.compress(lines(name)) if name.endswith(".gz") else lines(name)
        store.pipe_file(f"/bucket/{name}", content)
    try:
        assert texts(source("memory://bucket/data")) == ["data/train/a.jsonl.gz", "data/train/b.jsonl"]
        pattern = source("memory://bucket/data/*/*.jsonl")
        assert texts(pattern) == ["data/test/c.jsonl", "data/train/b.jsonl"]
        assert pattern.images == "memory://bucket/data"
        assert texts(source("memory://bucket/data/test/c.jsonl")) == ["data/test/c.jsonl"]
        with pytest.raises(DataError, match="memory://bucket/nowhere: no file of records"):
            texts(source("memory://bucket/nowhere"))
    finally:
        store.rm("/bucket", recursive=True)
