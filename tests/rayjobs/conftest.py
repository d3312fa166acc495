"""Records with images of every kind, and an encoder to read them."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayjobs.storage.files import read_jsonl, write_jsonl
from rayjobs.storage.paths import resolve_path
from tests.cafo.test_images import bomb
from tests.rayjobs.cafo_dataset import make_encoders


@pytest.fixture
def bucket(s3: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A folder of one test's own, and an empty cache of copies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return f"{s3}/{request.node.name}"


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> pytest.CaptureFixture[str]:
    """Capture what a command writes to a terminal that is wide enough to cut nothing."""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda stream: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "300")
    return capsys


def upload(folder: Path, url: str) -> None:
    """Everything in a folder, to a URL."""
    there: Any = resolve_path(url)
    there.fs.put(f"{folder}/", f"{there.path}/", recursive=True)


BAD = ("corrupt.png", "huge.png", "missing.png")


@pytest.fixture(scope="session")
def pictured(records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 101 records, every other one with an image of some kind, and three whose images cannot be read."""
    folder = tmp_path_factory.mktemp("pictured")
    draw = np.random.default_rng(0)
    plain = [Image.fromarray(draw.integers(0, 255, (37, 23, 3), np.uint8)) for _ in range(6)]
    exif = Image.Exif()
    exif[0x0112] = 6
    plain[0].save(folder / "plain.png")
    plain[1].convert("CMYK").save(folder / "cmyk.tiff")
    Image.fromarray(draw.integers(0, 65535, (23, 29), np.uint16)).save(folder / "sixteen.png")
    plain[2].save(folder / "animated.gif", save_all=True, append_images=plain[3:5])
    plain[5].save(folder / "rotated.jpg", exif=exif)
    Image.fromarray(draw.integers(0, 255, (60_000, 1), np.uint8)).save(folder / "thin.png")
    (folder / "corrupt.png").write_bytes((folder / "plain.png").read_bytes()[:70])
    (folder / "huge.png").write_bytes(bomb())
    kinds = sorted(path.name for path in folder.iterdir() if path.name not in BAD)
    rows = read_jsonl(records)
    rows = [{**row, "image": kinds[i // 2 % len(kinds)]} if i % 2 else row for i, row in enumerate(rows)]
    rows += [{**rows[0], "image": name} for name in BAD]
    write_jsonl(folder / "pictured.jsonl", rows)
    return folder / "pictured.jsonl"


@pytest.fixture(scope="session")
def vision(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a tiny encoder."""
    encoder = make_encoders(tmp_path_factory.mktemp("encoders"))["clip"]
    return [*(f"vision.encoder.{key}={value}" for key, value in encoder.items()), "vision.bottleneck=7"]
