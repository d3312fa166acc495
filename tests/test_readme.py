"""What README.md and docs/cluster.md tell a user to type or to write, done in their order on small inputs."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from rayjobs.__main__ import main
from rayjobs.storage.files import read_json, write_json
from rayjobs.storage.fingerprint import file_fingerprint
from tests.conftest import ROOT
from tests.rayjobs.cafo_dataset import make_encoders
from tests.sample_data import write_caltech, write_instructions

DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("cluster.md", "scaling.md"))]
"""The other documents name models on the hub and a user's own files; tests of their features run such commands."""


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), flags=re.M | re.S)


def commands() -> list[list[str]]:
    """Every command of the documents' shell blocks, as words, and then those of ours that stand within a text."""
    text = "\n".join(block for document in DOCUMENTS for block in blocks(document, "bash"))
    lines = text.replace("\\\n", " ").splitlines()
    for document in DOCUMENTS:
        inline = re.findall(r"`(python -m rayjobs [^`]+)`", document.read_text())
        lines += [" ".join(command.split()) for command in inline]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


OURS = ["python", "-m", "rayjobs"]
OTHERS = [words for words in commands() if words[:3] != OURS]


@pytest.mark.parametrize("words", OTHERS, ids=" ".join)
def test_other_tools_understand_what_they_are_told(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    tool, *arguments = words
    if tool == "make":
        assert arguments[0] in re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    elif tool == "ray":
        from ray.scripts.scripts import cli

        command, rest = cli.commands[arguments[0]], arguments[1:]
        if hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(command.name, rest)
        for file in (word for word in rest if word.endswith(".yaml")):
            assert yaml.safe_load((ROOT / file).read_text())["cluster_name"]
    elif tool == "aws":
        from botocore import session, xform_name

        service = session.get_session().get_service_model(arguments[0])
        called = {xform_name(name, "-"): name for name in service.operation_names}[arguments[1]]
        taken = {f"--{xform_name(name, '-')}" for name in service.operation_model(called).input_shape.members}
        shorter = {"--protocol", "--port", "--cidr"}  # the command line's own, for rules of a security group
        assert {word for word in arguments if word.startswith("--")} <= taken | shorter
        for file in (word.removeprefix("file://") for word in arguments if word.startswith("file://")):
            assert json.loads((ROOT / file).read_text())["Statement"]
    else:
        known = [
            "source .venv/bin/activate",
            "pip install -c constraints.txt boto3",
            "pip install -c constraints.txt -e .[s3]",
        ]
        assert " ".join(words) in known


@pytest.fixture
def folder(tmp_path: Path, trained_llama: Path, scienceqa: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, with small things where the documents say that weights and data are."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(trained_llama, tmp_path / "weights" / "stories260K")
    data = tmp_path / "data"
    write_caltech(data)
    write_instructions(data / "alpaca_2000.json")
    shutil.copytree(scienceqa, data / "scienceqa")
    pids = read_json(data / "scienceqa" / "pid_splits.json")["test"][:20]
    write_json(data / "scienceqa" / "pid_splits.json", dict.fromkeys(("train", "val", "test"), pids))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def encoder(section: str, found: dict[str, str]) -> list[str]:
    return [f"{section}.{key}={value}" for key, value in found.items()]


BASE = "./weights/stories260K"
PLACES = {
    "/models/llama-7b": BASE,
    "[/data/": "[data/",
    "s3://bucket/llama-7b": BASE,
    "[s3://bucket/": "[data/",
    "alpaca_data.json": "alpaca_2000.json",
    "runs/one": "runs/alpaca_tiny",
    "runs/two": "runs/scienceqa_blind",
    "scale.workers=8": "scale.workers=2",
    "search.samples=8": "search.samples=2",
}
LITTLE = {
    "alpaca_7b.yaml": ["adapter.n_layers=4"],
    "alpaca_tiny.yaml": [
        "data.max_length=256",
        "data.val_fraction=0.1",
        "train.epochs=3",
        "train.global_batch=16",
        "optimizer.base_lr=0.32",
    ],
    "scienceqa_7b.yaml": [
        "adapter.n_layers=4",
        "base.dtype=fp32",
        "train.global_batch=8",
        "train.epochs=1",
        "scale.workers=1",
    ],
    "debug.yaml": ["space.shots=[1]", "features.views=1"],
}


class Typed:
    """Types the documents' commands, with their places led to what is there, and little to compute."""

    def __init__(self, folder: Path) -> None:
        found = make_encoders(folder / "encoders")
        self.places = {**PLACES, "s3://bucket/runs": str(folder / "runs")}
        self.vision = encoder("vision.encoder", found["clip"])
        self.encoders = [word for name in found for word in encoder(f"encoders.{name}", found[name])]

    def __call__(self, words: list[str], *, dry: bool = True) -> None:
        job, *given = words[3:]
        for place, here in self.places.items():
            given = [word.replace(place, here) for word in given]
        line = " ".join(given)
        given = [word for word in given if word != "--submit" and (dry or word != "--dry-run")]
        given += [word for config, little in LITTLE.items() if config in line for word in little]
        given += self.vision * ("scienceqa_7b" in line) + self.encoders * (job == "cafo")
        given += ["--dry-run"] * ("--submit" in line)
        assert main([job, *given]) == 0, f"{job} {' '.join(given)}"


@pytest.mark.ray
@pytest.mark.slow
def test_commands_and_code_work_as_written(
    cluster: None, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed, ours = Typed(folder), [words for words in commands() if words[:3] == OURS]
    weights = file_fingerprint(folder / "weights" / "stories260K" / "consolidated.00.pth")
    assert len(ours) > 10
    for words in ours:
        typed(words)
        if "configs/adapter/scienceqa_7b.yaml" in words:
            typed(words, dry=False)  # a later command takes its adapter
    assert "ray job submit --working-dir . -- python -m rayjobs adapter-train" in capsys.readouterr().out
    learned = read_json("runs/alpaca_tiny/result.json")
    assert learned["val_loss"] < learned["base_val_loss"] - 0.3, "a trained LLaMA learns from instructions"
    assert file_fingerprint(folder / "weights" / "stories260K" / "consolidated.00.pth") == weights
    cascaded = read_json("runs/cafo_debug/test/result.json")
    assert cascaded["test_images"] == {"caltech101": 24}
    assert read_json("runs/cafo_debug/result.json")["truncated_sentences"] > 0

    for place, names in {"red": "ab", "cat": "1abcd"}.items():
        (folder / "photos" / place).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (40, 40), (ord(name), 99, 9)).save(folder / "photos" / place / f"{name}.jpg")
    shutil.copy(folder / "encoders" / "dino.pth", folder / "weights" / "dino_resnet50_pretrain.pth")
    shutil.copytree(folder / "encoders" / "clip", folder / "openai")
    Image.new("RGB", (60, 40)).save(folder / "photo.jpg")
    for code in blocks(ROOT / "README.md", "python"):
        small = re.sub('name="(RN50|ViT-L-14-quickgelu)"', 'name="tiny"', code).replace("/models/llama-7b", BASE)
        small = small.replace('weights="openai"', f'weights="{folder}/openai"')
        exec(compile(small.replace('kind="dino"', 'kind="timm", name="test_resnet"'), "README.md", "exec"), {})
    assert (folder / "pets.safetensors").exists()
    assert (folder / "mine.safetensors").exists()
