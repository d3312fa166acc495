"""cafo-generate: every source, what CLIP keeps, what a stop loses, and what is refused before anything is drawn."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cafo.datasets import load_generated_list
from cafo.encoders import EncoderSpec, load_encoder
from cafo.generate import FolderGenerator
from rayjobs.__main__ import main
from rayjobs.config import load
from rayjobs.jobs import cafo_generate
from tests.cafo.server import serve
from tests.cafo.test_encoders import RESNET
from tests.rayjobs.pages import page_text

NAMES = ["red_thing", "green thing", "blue_thing"]
COLOURS = [(230, 20, 20), (20, 210, 30), (10, 20, 220)]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(RESNET))
    return path


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Five images per class, one of the reds broken; one folder is named with a space, as the class is not."""
    for name, colour in zip(["red thing", "green thing", "blue_thing"], COLOURS, strict=True):
        folder = tmp_path / "drawn" / name
        folder.mkdir(parents=True)
        for i in range(5):
            image = Image.new("RGB", (40, 36), colour)
            image.paste((255, 255, 255), (0, 0, 8 * i, 36))
            image.save(folder / f"{i}.png")
    (tmp_path / "drawn" / "red thing" / "2.png").write_bytes(b"broken")
    return tmp_path / "drawn"


def overrides(tmp_path: Path, clip: Path, *more: str) -> list[str]:
    return [
        f"class_names={json.dumps(NAMES)}",
        "clip.kind=clip",
        "clip.weights=random:0",
        f"clip.config={clip}",
        "candidates=5",
        "keep=3",
        f"run.storage={tmp_path / 'runs'}",
        "run.name=g",
        *more,
    ]


def settings(tmp_path: Path, clip: Path, *more: str) -> cafo_generate.Config:
    return load(cafo_generate.Config, None, overrides(tmp_path, clip, *more))


def written(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "runs" / "g" / "generated" / "dalle_generated.json").read_text())


def test_clip_keeps_the_best_of_a_folder(tmp_path: Path, clip: Path, drawn: Path) -> None:
    sentences = tmp_path / "prompts.json"
    sentences.write_text(json.dumps({name: [f"a {name}", f"some {name} here"] for name in NAMES}))
    result = cafo_generate.run(settings(tmp_path, clip, "source=folder", f"folder={drawn}", f"prompts={sentences}"))
    assert (result["images"], result["rejected_images"], result["classes_short_of_keep"]) == (9, 1, 0)
    rejected = [json.loads(line) for line in (tmp_path / "runs" / "g" / "rejected.jsonl").read_text().splitlines()]
    assert [row["class"] for row in rejected] == ["red_thing"]
    assert "2.png" in rejected[0]["reason"]

    assert (tmp_path / "runs" / "g" / "report.html").read_text().count("<img") == 9
    report = page_text(tmp_path / "runs" / "g")
    kept = written(tmp_path)["train"]
    assert all(f"{name} ({written(tmp_path)['scores'][path]:.3f})" in report for path, _, name in kept)
    assert rejected[0]["reason"] in report

    # The naive choice: cosine of each candidate with the mean sentence.
    encoder: Any = load_encoder(EncoderSpec(kind="clip", weights="random:0", config=str(clip)))
    items = load_generated_list(result["list"], NAMES)
    for label, name in enumerate(NAMES):
        text = encoder.encode_text([f"a {name}", f"some {name} here"]).mean(0)
        scores = []
        for path in sorted((drawn / name.replace("red_", "red ")).iterdir()):
            if path.read_bytes() != b"broken":
                image = encoder.encode_image(encoder.preprocess(Image.open(path))[None])[0]
                scores.append(float(image @ text / text.norm()))
        own = [item for item in items if item.label == label]
        kept = [written(tmp_path)["scores"][item.path] for item in own]
        torch.testing.assert_close(torch.tensor(kept), torch.tensor(sorted(scores, reverse=True)[:3]))
        assert {written(tmp_path)["prompts"][item.path] for item in own} == {f"a photo of a {name.replace('_', ' ')}."}
        assert all((Path(result["list"]).parent / item.path).is_file() for item in own)


def test_an_endpoint_draws_a_class_once_and_a_refusal_keeps_the_rest(
    tmp_path: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai")
    with serve(fail_first=1) as (url, requests):
        more = ["source=endpoint", "endpoint.model=dall-e", f"endpoint.base_url={url}", "endpoint.key_variable="]
        more += ["endpoint.requests_per_minute=60000", "endpoint.retries=0", "size=64x48", "template=art of a {}."]
        given = overrides(tmp_path, clip, *more)
        assert main(["cafo-generate", *given]) == 2
        told = capsys.readouterr().err
        assert "dall-e at http://127.0.0.1" in told
        assert "Traceback" not in told
        assert main(["cafo-generate", *given]) == 0
        assert len(requests) == 1 + 3 * 5
        assert {(r["prompt"], r["size"]) for r in requests[-5:]} == {("art of a blue thing.", "64x48")}
        content = written(tmp_path)
        assert cafo_generate.run(settings(tmp_path, clip, *more))["classes_drawn_now"] == 0
        assert len(requests) == 16
        assert written(tmp_path) == content
        with pytest.raises(ValueError, match="keep was 3, now 2"):
            cafo_generate.run(settings(tmp_path, clip, *more, "keep=2"))


def test_a_refusal_is_a_rejected_image_and_a_bad_request_is_an_error(
    tmp_path: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai")
    with serve(refuse="green") as (url, requests):
        more = ["source=endpoint", "endpoint.model=dall-e", f"endpoint.base_url={url}", "endpoint.key_variable="]
        more += ["endpoint.requests_per_minute=60000", "endpoint.retries=0"]
        result = cafo_generate.run(settings(tmp_path, clip, *more))
        assert (result["images"], result["rejected_images"]) == (6, 5)
        assert result["classes_without_images"] == ["green thing"]
        rejected = [json.loads(line) for line in (tmp_path / "runs" / "g" / "rejected.jsonl").read_text().splitlines()]
        assert all("refused by the endpoint" in row["reason"] and "safety" in row["reason"] for row in rejected)
        cafo_generate.run(settings(tmp_path, clip, *more))  # asks for the refused class alone
        assert len(requests) == 15 + 5
        assert len((tmp_path / "runs" / "g" / "rejected.jsonl").read_text().splitlines()) == 5
    with serve(refuse="thing") as (url, _):
        more[2] = f"endpoint.base_url={url}"
        assert main(["cafo-generate", *overrides(tmp_path, clip, *more, "run.name=none")]) == 2
        assert "no usable image" in capsys.readouterr().err


def test_a_stop_loses_one_class_and_changes_nothing(
    tmp_path: Path, clip: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["source=folder", f"folder={drawn}"]
    cafo_generate.run(settings(tmp_path, clip, *more))
    whole = written(tmp_path)
    (tmp_path / "runs").rename(tmp_path / "whole")
    generate = FolderGenerator.generate

    def stopped(self: FolderGenerator, class_name: str, prompt: str, n: int, seed: int) -> Iterator[Any]:
        if class_name == "blue_thing" and n:
            raise KeyboardInterrupt
        return generate(self, class_name, prompt, n, seed)

    with monkeypatch.context() as patch:
        patch.setattr(FolderGenerator, "generate", stopped)
        assert main(["cafo-generate", *overrides(tmp_path, clip, *more)]) == 130
    assert {label for _, label, _ in written(tmp_path)["train"]} == {0, 1}
    capsys.readouterr()
    cafo_generate.plan(settings(tmp_path, clip, *more))
    assert "1 of 3 classes × 5 candidates" in " ".join(capsys.readouterr().out.split())
    result = cafo_generate.run(settings(tmp_path, clip, *more))
    assert (result["classes_drawn_now"], result["rejected_images"]) == (1, 1)
    assert written(tmp_path) == whole


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["source=folder"], "source is folder, so folder is required"),
        (["source=endpoint"], "endpoint.model is required"),
        (["source=diffusers"], "diffusers.model is required"),
        (["source=folder", "folder=DRAWN", "keep=6"], "keep must be at most the 5 candidates, got 6"),
        (["source=folder", "folder=DRAWN", "clip.kind=timm"], "clip.kind must be clip"),
        (["source=folder", "folder=DRAWN", "template=a photo"], "one {} for the class name"),
        (["source=folder", "folder=DRAWN", "class_names=[emu, blue_thing, rhino]"], "'emu'.*\n.*'rhino'"),
        (["source=folder", "folder=nowhere"], "no folder .*/nowhere;"),
        (["source=folder", "folder=DRAWN", "prompts=none.json"], "no file .*/none.json;"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_written(
    tmp_path: Path, clip: Path, drawn: Path, more: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cafo_generate.run(settings(tmp_path, clip, *[text.replace("DRAWN", str(drawn)) for text in more]))
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is not None, reason="diffusers is installed")
def test_diffusers_names_its_extra(tmp_path: Path, clip: Path) -> None:
    with pytest.raises(ValueError, match="`diffusers` extra"):
        cafo_generate.run(settings(tmp_path, clip, "source=diffusers", "diffusers.model=some/model"))
