"""CaFo's jobs and the images of the adapter's on a bucket: the same results as on a local disk, and cut off there."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from adapter import AdaptedModel
from adapter.adaption import AdaptionConfig
from cafo.cache import load_cache
from cafo.datasets import load_generated_list
from cafo.encoders import EncoderSpec, load_encoder
from cafo.errors import ImageError
from cafo.generate import FolderGenerator
from cafo.images import load_image
from rayjobs.config import load, to_dict
from rayjobs.inference import class_descriptions
from rayjobs.jobs import adapter_eval, cafo, cafo_generate, cafo_prompt, cafo_tune
from rayjobs.models.encoder import VisionEncoderConfig, load_vision_encoder
from rayjobs.models.image_conditioning import VisionConfig
from rayjobs.storage.download import cached_path
from rayjobs.storage.files import read_json, read_parquet, write_json
from rayjobs.storage.fingerprint import file_fingerprint, file_fingerprints
from rayjobs.storage.paths import resolve_path
from rayjobs.storage.sync import SyncedFolder
from tests.rayjobs.cafo_dataset import CLASSES, CLIP, make_dataset, make_encoders, make_images
from tests.rayjobs.conftest import upload
from tests.rayjobs.pages import page_text

NAMES = list(CLASSES)


def chain(given: list[str], root: str) -> cafo.Config:
    """All steps over the world at `root`, a folder or a URL."""
    steps = ["prompt.source=templates", "generate.source=folder", f"generate.folder={root}/generated/train"]
    steps += ["generate.candidates=3", "generate.keep=2", "generate.template='art of a {}.'"]
    few = ["space.shots=[2]", "space.seeds=[0,1]", "space.generated=[0,2]", "space.epochs=[2]", "search.beta_steps=20"]
    given = [one for one in given if not one.startswith(("data.prompts", "data.generated"))]
    return load(cafo.Config, None, [*given, *steps, *few, "data.name=colours", "run.name=chain"])


def made(config: cafo.Config) -> dict[str, Any]:
    """What a sweep and its evaluation came to, the time it took apart."""
    folder = config.run.folder
    chosen = read_json(folder / "chosen.json")["chosen"]
    return {
        "rows": [row | {"seconds": 0} for row in read_parquet(folder / "results.parquet").to_pylist()],
        "chosen": chosen,
        "encoders": [
            load_cache(cached_path(folder / "trials" / seed["trial"] / "cache.safetensors")).encoders
            for cell in chosen
            for seed in cell["seeds"]
        ],
        "accuracy": read_parquet(folder / "test" / "accuracy.parquet").to_pylist(),
        "examples": [one["caption"] for one in read_json(folder / "test" / "examples.json")["images"]],
        "rejected": [(row["role"], row["path"]) for row in map(json.loads, lines(folder / "test" / "rejected.jsonl"))],
    }


def stamps(config: cafo.Config) -> dict[str, Any]:
    """When each part of the features and each trial's result was written."""
    folder: Any = config.run.cache_folder.parent
    found = folder.fs.find(folder.path, detail=True).items()
    kept = {path: about["LastModified"] for path, about in found if "/features/" in path or "/trials/" in path}
    return {f"s3://{path}": at for path, at in kept.items() if path.endswith((".parquet", "/result.json"))}


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@pytest.mark.ray
@pytest.mark.slow
def test_the_whole_of_cafo_on_a_bucket_is_the_same(cluster: None, bucket: str, tmp_path: Path) -> None:
    here = tmp_path / "world"
    given = [*make_dataset(here), "features.max_rejected_fraction=0.1"]
    (here / "images" / "test" / "grey" / "003.png").write_bytes(b"no image")
    (here / "images" / "test" / "grey" / "004.png").unlink()
    upload(here, bucket)
    local, there = chain(given, str(here)), chain([one.replace(str(here), bucket) for one in given], bucket)
    cafo.run(local)
    before = set(tmp_path.rglob("*"))
    result = cafo.run(there)
    assert made(there) == made(local)
    assert made(there)["rejected"] == [("colours", f"test/grey/{i:03d}.png") for i in (3, 4)]
    assert {path for path in set(tmp_path.rglob("*")) - before if "cache" not in path.parts} == set()
    test = there.run.folder / "test"
    assert {"table.md", "opened.json", "result.json"} <= {path.name for path in test.iterdir()}
    assert len(list(test.glob("landscape-*.png"))) == 1
    assert result["eval"]["headline"] in page_text(there.run.folder)

    # one lost trial and one lost part of the features are made again, and nothing else is
    before = stamps(there)
    lost = [next(path for path in before if name in path) for name in ("part-", "/result.json")]
    for path in lost:
        resolve_path(path).unlink()
    cafo_tune.run(cafo.tune_settings(there))
    assert made(there) == made(local)
    now = stamps(there)
    assert [path for path in before if now[path] != before[path]] == lost


@pytest.mark.ray
@pytest.mark.slow
def test_scienceqa_on_a_bucket_is_answered_and_scored_the_same(
    cluster: None, bucket: str, tmp_path: Path, tiny_base: Path
) -> None:
    """Images stored and streamed, one of them damaged and one missing."""
    here = tmp_path / "here"
    scienceqa(here / "qa")
    encoder = make_encoders(here / "encoders")["clip"]
    shutil.copytree(tiny_base, here / "base")
    base = AdaptedModel.from_pretrained(tiny_base)
    projection = VisionConfig(encoder=VisionEncoderConfig(**encoder), bottleneck=5).open().projection
    base.add_adapter(AdaptionConfig(n_layers=2, prompt_length=3, vision=projection))
    for adaption in base.model.adaptions:
        torch.nn.init.constant_(adaption.gate, 1.0)
    base.save_adapter(here / "adapter.safetensors")
    upload(here, bucket)

    def found(root: str, name: str, **more: Any) -> list[dict[str, Any]]:
        given = {
            "base": {"path": f"{root}/base"},
            "adapter": f"{root}/adapter.safetensors",
            "vision": {"encoder": {**encoder, "weights": f"{root}/encoders/clip"}, "bottleneck": 5},
            "data": {"path": [f"{root}/qa"], "format": "scienceqa", "max_rejected_fraction": 0.2},
            "run": {"name": name, "storage": f"{root}/runs"},
        }
        config = load(adapter_eval.Config, {**given, **more}, [f"vision.mode={name}"] if "task" not in more else [])
        adapter_eval.run(config)
        file = "predictions.parquet" if "task" in more else "losses.parquet"
        return read_parquet(config.run.folder / file).to_pylist()

    how = {"task": "scienceqa", "reading": "likelihood", "batch_size": 8}
    answers, there = (found(root, "answered", **how) for root in (str(here), bucket))
    assert [{**row, "image_error": bool(row["image_error"])} for row in there] == [
        {**row, "image_error": bool(row["image_error"])} for row in answers
    ]
    assert [row["pid"] for row in there if row["image_error"]] == ["2", "14"]
    losses = found(str(here), "stored")
    assert len(losses) == 16 - 2
    for mode in ("stored", "streamed"):
        there = found(bucket, mode)
        assert [row["id"] for row in there] == [row["id"] for row in losses]
        assert [row["loss"] for row in there] == pytest.approx([row["loss"] for row in losses], abs=1e-4)


def scienceqa(folder: Path) -> None:
    """Sixteen problems to train on and to test on, every other one with an image."""
    draw, problems = np.random.default_rng(0), {}
    for i in range(16):
        problem = {"question": f"which {i}?", "choices": ["red hill", "big dog", "the mat"], "answer": i % 3}
        problem |= {"hint": "", "image": None if i % 2 else "image.png", "split": "test"}
        problems[str(i)] = problem | {"subject": "natural science", "grade": "grade2"}
        if not i % 2:
            path = folder / "images" / "test" / str(i) / "image.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(draw.integers(0, 255, (37, 23, 3), np.uint8)).save(path)
    path.unlink()
    (folder / "images" / "test" / "2" / "image.png").write_bytes(b"no image")
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({split: list(problems) for split in ("train", "test")}))


def test_an_encoder_is_the_same_from_a_url_and_a_lone_file_brings_its_json(bucket: str, tmp_path: Path) -> None:
    make_dataset(tmp_path / "world")
    clip, dino = tmp_path / "world" / "encoders" / "clip", tmp_path / "world" / "encoders" / "dino.pth"
    (clip / "open_clip_model.safetensors").rename(clip / "lone.safetensors")
    (clip / "open_clip_config.json").rename(clip / "lone.json")
    upload(clip.parent, f"{bucket}/encoders")
    for kind, name, file in (("clip", "", "clip/lone.safetensors"), ("timm", "test_resnet", "dino.pth")):
        local = load_encoder(EncoderSpec(kind=kind, name=name, weights=str(clip.parent / file)))  # type: ignore[arg-type]
        there = VisionEncoderConfig(kind=kind, name=name, weights=f"{bucket}/encoders/{file}")  # type: ignore[arg-type]
        assert there.weights == f"{bucket}/encoders/{file}", "other machines make copies of their own"
        assert load_vision_encoder(there).identity == local.identity
    assert dino.exists()
    identities = []
    for config in (f"{tmp_path}/model.json", f"{bucket}/model.json"):
        write_json(config, {"model_cfg": CLIP})
        given = EncoderSpec(kind="clip", name="tiny", weights="random:0", config=config)
        identities.append(load_vision_encoder(given).identity)
    assert identities[0] == identities[1]


def test_an_image_that_is_not_there_is_no_image_and_a_store_out_of_reach_is_an_error(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (resolve_path(bucket) / "a" / "b.png").write_bytes(b"123")
    with pytest.raises(ImageError, match=r"b\.png: cannot be decoded"):
        load_image(resolve_path(bucket) / "a" / "b.png")
    with pytest.raises(ImageError, match=r"c\.png: no such file"):
        load_image(resolve_path(bucket) / "a" / "c.png")
    before = file_fingerprints(bucket, ["a/c.png", "a/b.png"])
    assert before == {"a/c.png": None, "a/b.png": file_fingerprint(f"{bucket}/a/b.png")}
    (resolve_path(bucket) / "a" / "b.png").write_bytes(b"124")
    after = file_fingerprints(bucket, ["a/b.png"])
    assert after["a/b.png"] not in (None, before["a/b.png"])

    def unreachable(self: Any) -> bytes:
        raise ConnectionError("the network is down")

    monkeypatch.setattr(type(resolve_path(bucket)), "read_bytes", unreachable)
    with pytest.raises(ConnectionError):
        load_image(resolve_path(bucket) / "a" / "b.png")


def test_prompts_and_drawn_images_go_on_where_they_were_killed(
    bucket: str, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed driver sends nothing more: what counts is what was sent after each class."""
    make_images(tmp_path / "drawn", {"train": 3})
    upload(tmp_path / "drawn" / "train", f"{bucket}/drawn")
    upload(tiny_base, f"{bucket}/base")
    write_json(f"{bucket}/tiny.json", {"model_cfg": CLIP})
    write_json(f"{bucket}/template.json", {"with_input": "{instruction} {input}", "without_input": "{instruction} So:"})
    common = [f"class_names={json.dumps(NAMES)}", f"run.storage={bucket}/runs"]
    asked = ["source=llama", f"llama.base.path={bucket}/base", f"llama.template={bucket}/template.json"]
    asked += ["answers=2", "sampling.max_tokens=7", "commands=['What is a {}?']"]
    drawing = ["source=folder", f"folder={bucket}/drawn", "candidates=3", "keep=2", "clip.kind=clip"]
    drawing += [
        "clip.weights=random:0",
        f"clip.config={bucket}/tiny.json",
        f"prompts={bucket}/runs/whole-p/prompts.json",
    ]
    whole = {}
    for job, more, letter in ((cafo_prompt, asked, "p"), (cafo_generate, drawing, "g")):
        whole[letter] = load(job.Config, None, [*common, *more, f"run.name=whole-{letter}"])
        job.run(whole[letter])
        config = load(job.Config, None, [*common, *more, f"run.name={letter}"])
        with monkeypatch.context() as patch:
            patch.setattr(SyncedFolder, "__exit__", lambda *_: None)
            for maker, method in ((class_descriptions.LlamaModel, "describe"), (FolderGenerator, "generate")):
                stop_at(patch, maker, method, NAMES[2])
            with pytest.raises(KeyboardInterrupt):
                job.run(config)
        again = job.run(config)
        assert again["classes_asked_now" if job is cafo_prompt else "classes_drawn_now"] == 2
    runs = resolve_path(bucket) / "runs"
    assert read_json(runs / "p" / "prompts.json") == read_json(runs / "whole-p" / "prompts.json")
    drawn = [runs / name / "generated" for name in ("g", "whole-g")]
    found = [read_json(folder / "dalle_generated.json") for folder in drawn]
    assert found[0] == found[1]
    items = load_generated_list(drawn[0] / "dalle_generated.json", NAMES)
    assert len(items) == 8
    assert {item.path for item in items} == {str(path.relative_to(drawn[0])) for path in drawn[0].rglob("*.png")}
    assert to_dict(whole["g"])["folder"] == f"{bucket}/drawn"


def stop_at(patch: pytest.MonkeyPatch, maker: type, method: str, name: str) -> None:
    """The maker is stopped when it is asked for a class."""
    make = getattr(maker, method)

    def stopped(self: Any, class_name: str, *given: Any) -> Any:
        if class_name == name and given[1]:  # 0 images are asked for to see that the folder is there
            raise KeyboardInterrupt
        return make(self, class_name, *given)

    patch.setattr(maker, method, stopped)
