"""What README.md and docs/ tell a reader to type or to write is done as it stands, with the files of example-data.

A block behind a comment `<!-- needs: … -->` needs what is not here. Its settings are checked without running it, and
those about a 7B model or ScienceQA are planned on small stand-ins.
"""

import ast
import importlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml

from adapter.records.reader import read_records
from rayjobs.__main__ import COMMANDS, JOBS, main
from rayjobs.config import load
from rayjobs.data.records import DataConfig
from rayjobs.demo.example_data import write_example_data
from rayjobs.job_help import config_class
from rayjobs.storage.files import read_json, read_jsonl, write_json
from rayjobs.storage.fingerprint import file_fingerprint
from tests.conftest import ROOT
from tests.documents import OURS, Block, blocks, commands, inline_commands, pages
from tests.rayjobs.cafo_dataset import make_encoders

CODE = blocks("bash", "python")
RUN, MARKED = [block for block in CODE if not block.needs], [block for block in CODE if block.needs]
OTHERS = [words for block in CODE if block.language == "bash" for words in commands(block) if words[:3] != OURS]
ACTIVATE = ["source", ".venv/bin/activate"]
OPTIONS = ("--dry-run", "--submit", "--verbose")

NEEDED = {
    "minutes": 1,
    "a 7B model": 2,
    "a 7B model, ScienceQA": 2,
    "a 7B model, OpenAI's CLIP": 1,
    "a cluster": 8,
    "a cluster, a bucket": 1,
    "a server that stays": 3,
    "an endpoint": 1,
    "Caltech101": 2,
    "the demo's models": 1,
    "features of one's own": 3,
    "OpenAI's CLIP, DINO": 2,
    "the hub": 2,
    "Docker": 1,
}
"""{what is not here: blocks that need it}. A new one is put down here, so that it is not marked by habit."""


def test_blocks_that_cannot_run_here_are_few_and_known() -> None:
    assert Counter(block.needs for block in MARKED) == NEEDED
    assert len(RUN) >= 15
    others = [words for block in RUN if block.language == "bash" for words in commands(block) if words[:3] != OURS]
    assert all(words == ACTIVATE for words in others), "a block of another tool says what it needs"


@pytest.mark.parametrize("words", OTHERS, ids=" ".join)
def test_other_tools_understand_what_they_are_told(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    tool, *arguments = words
    if tool == "make":
        assert arguments[0] in re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    elif tool in ("ray", "serve"):
        cli = importlib.import_module("ray.scripts.scripts" if tool == "ray" else "ray.serve.scripts").cli
        command, rest = cli.commands[arguments[0]], arguments[1:]
        if hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(command.name, rest)
        for file in (word for word in rest if word.endswith(".yaml") and tool == "ray"):
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
    elif tool == "docker":
        image = (ROOT / "Dockerfile").read_text()
        folder = re.search(r"^WORKDIR (\S+)$", image, flags=re.M)
        assert folder
        assert all(word == f"demo:{folder[1]}/runs" for word in arguments if ":" in word)
        assert f"#   {' '.join(words)}" in image, "the first lines of Dockerfile say the same"
    elif tool == "curl":
        (url,) = [word for word in arguments if word.startswith("http://127.0.0.1:8000/")]
        assert f'"{url.removeprefix("http://127.0.0.1:8000")}"' in (ROOT / "rayjobs" / "serve" / "app.py").read_text()
        json.loads(arguments[arguments.index("-d") + 1] if "-d" in arguments else "{}")
    elif words[:2] == ["python", "-m"]:
        assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
    else:
        known = [
            "source .venv/bin/activate",
            "pip install -c constraints.txt boto3",
            "pip install -c constraints.txt -e .[s3]",
        ]
        assert " ".join(words) in known


def check_command(words: list[str]) -> None:
    """Check the job and all settings of a command of ours, without running it."""
    if words[:3] != OURS:
        assert importlib.util.find_spec(words[2]), words
        return
    job, *given = words[3:]
    assert job in COMMANDS, words
    if job in JOBS:
        config = given[given.index("--config") + 1] if "--config" in given else None
        given = [word for word in given if word not in ("--config", config, *OPTIONS)]
        load(config_class(job), config, given)


@pytest.mark.parametrize("block", MARKED, ids=lambda block: block.place)
def test_settings_and_names_of_blocks_that_cannot_run_here_exist(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if block.language == "bash":
        for words in commands(block):
            if words[:3] == OURS:
                check_command(words)
        return
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_commands_within_sentences_have_settings_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in inline_commands():
        if len(words) > 4 or words[:3] != OURS:  # a whole command, and not the name of a job
            check_command(words)


def test_examples_of_records_are_read_and_examples_of_settings_are_loaded(tmp_path: Path) -> None:
    for block in blocks("jsonl"):
        (tmp_path / "records.jsonl").write_text(block.text)
        assert len(list(read_records(tmp_path / "records.jsonl"))) == len(block.text.splitlines()), block.place
    for block in blocks("yaml", "json"):
        values = yaml.safe_load(block.text)
        if "data" in values:
            load(DataConfig, values["data"])


def texts(file: Path) -> str:
    """All texts of a program file, with `…` for what is filled in, one per line."""
    tree, found = ast.parse(file.read_text(encoding="utf-8")), []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return "\n".join(found)


def test_messages_of_the_troubleshooting_page_are_those_of_the_program() -> None:
    program = "\n".join(texts(file) for name in ("adapter", "cafo", "rayjobs") for file in (ROOT / name).rglob("*.py"))
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, flags=re.M)
    assert len(messages) > 30
    unknown = [
        message
        for message in messages
        if not all(part.strip(" ():") in program for part in message.split("…") if part.strip(" ():"))
    ]
    assert not unknown


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert link.startswith("https://") or (ROOT / link).is_file(), link
    assert sum(path.stat().st_size for path in (ROOT / "docs" / "images").iterdir()) < 150_000
    assert len(pages()[0].read_text(encoding="utf-8").splitlines()) <= 130, "two screens"


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what example-data makes, as the first of all commands leaves it."""
    folder = tmp_path_factory.mktemp("reader")
    write_example_data(folder / "examples")
    return folder


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3000)  # forty commands
def test_blocks_run_as_they_stand(cluster: None, examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(examples)
    weights = file_fingerprint(examples / "examples" / "base" / "model.safetensors")
    names: dict[str, dict[str, object]] = {}
    for block in RUN:
        if block.language == "python":
            exec(compile(block.text, block.place, "exec"), names.setdefault(block.page, {}))
            continue
        for words in commands(block):
            if words != ACTIVATE:
                assert main(words[3:]) == 0, f"{block.place}: {' '.join(words)}"
    assert file_fingerprint(examples / "examples" / "base" / "model.safetensors") == weights
    learned = read_json("runs/notes/result.json")
    assert learned["val_loss"] < 0.5 < learned["base_val_loss"]
    assert read_json("runs/notes_val/result.json")["loss"] == pytest.approx(learned["val_loss"], abs=1e-3)
    questions, answers = read_json("examples/records/test.json"), read_jsonl("runs/notes_answers/answers.jsonl")
    right = [answer["answer"].strip() == asked["output"] for asked, answer in zip(questions, answers, strict=True)]
    assert sum(right) >= 0.7 * len(right), "the adapter answers held-out questions"
    for made in ("mine.safetensors", "drawings.safetensors", "notes.pth", "comparison.html"):
        assert (examples / made).is_file()


@pytest.fixture(scope="module")
def stand_ins(examples: Path, scienceqa: Path) -> dict[str, str]:
    """ScienceQA's layout beside the examples, and the settings of a tiny encoder."""
    shutil.copytree(scienceqa, examples / "scienceqa")
    pids = read_json(examples / "scienceqa" / "pid_splits.json")["test"][:20]
    write_json(examples / "scienceqa" / "pid_splits.json", dict.fromkeys(("train", "val", "test"), pids))
    return make_encoders(examples / "encoders")["clip"]


PLACES = {
    "/models/llama-7b": "examples/base",
    "s3://bucket/llama-7b": "examples/base",
    "/data/alpaca_data.json": "examples/records/train.json",
    "s3://bucket/alpaca_data.json": "examples/records/train.json",
    "/data/scienceqa": "scienceqa",
    "run.storage=s3://bucket/runs": "run.storage=plans",
}
SMALL = {
    "--config alpaca_7b": ["adapter.n_layers=3", "data.max_length=200"],
    "--config scienceqa_7b": ["adapter.n_layers=3", "data.max_length=200", "base.dtype=fp32"],
    "task=scienceqa": ["data.max_length=200"],
}


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in MARKED if "7B" in b.needs or "bucket" in b.needs], ids=lambda b: b.place)
def test_blocks_about_large_models_are_planned_on_small_ones(
    block: Block, examples: Path, stand_ins: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if block.language != "bash":
        return
    monkeypatch.chdir(examples)
    for job, *given in (words[3:] for words in commands(block)):
        if any(word.startswith("adapter=runs/") for word in given):
            continue  # the plan opens an adapter that is there only after training
        for place, here in PLACES.items():
            given = [word.replace(place, here) for word in given]
        line = " ".join(given)
        given = [word for word in given if word != "--submit"]
        given += [word for config, small in SMALL.items() if config in line for word in small]
        if "--config scienceqa_7b" in line:
            given += [f"vision.encoder.{key}={value}" for key, value in stand_ins.items()]
        given += ["run.storage=plans"] * ("run.storage" not in line) + ["--dry-run"] * ("--dry-run" not in line)
        assert main([job, *given]) == 0, f"{block.place}: {job} {' '.join(given)}"
