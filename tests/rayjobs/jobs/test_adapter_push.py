"""Uploads to the hub, against a server that speaks its API over a socket, and the adapter back from there."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from adapter import read_adapter
from rayjobs.__main__ import main
from rayjobs.config import load
from rayjobs.data.trained_records import record_digest, write_digests
from rayjobs.errors import ConfigError, DataError, StorageError, UserError
from rayjobs.inference.adapter_source import AdapterSourceConfig
from rayjobs.inference.training_records import find_overlap
from rayjobs.jobs import adapter_push
from rayjobs.storage.hub import pin
from rayjobs.storage.hub_model import TRAINED_RECORDS_FILE
from tests.hub_server import TOKEN, Hub, serve_hub, use_hub
from tests.rayjobs.reporting.test_model_card import make_run

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's uploads

FILES = ["README.md", "adapter.safetensors", "config.yaml", "result.json"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub() as hub:
        use_hub(hub.url, str(tmp_path / "home"), monkeypatch, token=TOKEN)
        yield hub


@pytest.fixture
def run(tmp_path: Path, tiny_base: Path) -> Path:
    return make_run(tmp_path / "run", tiny_base)


def push(adapter: Path, repo: str = "me/mine", *more: str) -> dict[str, str]:
    return adapter_push.run(load(adapter_push.Config, None, [f"adapter={adapter}", f"repo={repo}", *more]))


def test_a_run_is_pushed_and_serves_from_there(hub: Hub, run: Path, tiny_base: Path, tmp_path: Path) -> None:
    result = push(run)
    repo = hub.repos["model", "me/mine"]
    assert repo.private
    assert result["commit"] == repo.commits[-1].sha
    files = repo.commits[-1].files
    assert sorted(files) == [".gitattributes", *FILES]
    assert files["adapter.safetensors"] == (run / "adapter.safetensors").read_bytes()
    assert json.loads(files["result.json"])["adapter"] == "adapter.safetensors"
    card = files["README.md"].decode()
    assert hub.cards == [card]
    assert "adapter=me/mine \\" in card
    for name in ("README.md", "config.yaml", "result.json"):
        assert not any(private in files[name].decode() for private in (str(tmp_path), str(tiny_base.parent), "bucket"))

    source = load(AdapterSourceConfig, {"base": {"path": str(tiny_base)}, "adapter": "me/mine"})
    assert source.adapter == "hf://me/mine"
    assert pin(source.adapter) == f"hf://me/mine@{result['commit']}"
    model = source.load("cpu", source.open().conditioning)
    local = read_adapter(run / "adapter.safetensors")
    assert torch.equal(torch.stack([adaption.prompt for adaption in model.model.adaptions]), local.prompt)


def test_a_second_push_is_a_new_commit_and_an_equal_one_is_none(hub: Hub, run: Path) -> None:
    first = push(run)
    assert push(run)["commit"] == first["commit"]
    (run / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    second = push(run, "me/mine", "message=A better card")
    commits = hub.repos["model", "me/mine"].commits
    assert [commit.sha for commit in commits[1:]] == [first["commit"], second["commit"]]
    assert commits[-1].message == "A better card"
    assert ModelCard(commits[-1].files["README.md"].decode()).data.to_dict() == {"license": "mit"}


def test_an_adapter_file_alone_is_pushed_with_a_card(hub: Hub, run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "some.safetensors"
    (run / "adapter.safetensors").rename(alone)
    push(alone, "org/alone", "public=true")
    repo = hub.repos["model", "org/alone"]
    assert not repo.private
    assert sorted(repo.commits[-1].files) == [".gitattributes", "README.md", "adapter.safetensors"]
    assert b"# alone" in repo.commits[-1].files["README.md"]


def test_what_is_unfinished_or_no_adapter_is_refused(hub: Hub, run: Path, tmp_path: Path, tiny_base: Path) -> None:
    running = make_run(tmp_path / "cut", tiny_base, state="failed")
    for path in (running, running / "adapter.safetensors"):
        with pytest.raises(DataError, match="the run is not finished, but failed; the command that began it resumes"):
            push(path)
    with pytest.raises(DataError, match=r"holds no run: there is no run.json"):
        push(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        push(tmp_path / "nowhere")
    (run / "adapter.safetensors").unlink()
    with pytest.raises(DataError, match=r"a run of adapter-train, which left no adapter.safetensors"):
        push(run)
    for repo in ("mine", "org/mine@main", "https://host/org/mine", "./org/mine"):
        with pytest.raises(ConfigError, match="must be the id of a repository on the hub, org/name"):
            push(run, repo)
    assert not hub.requests


def test_a_public_repository_takes_nothing_that_was_to_be_private(hub: Hub, run: Path) -> None:
    hub.add("me/open", {"README.md": b"-"})
    with pytest.raises(UserError, match="me/open is there and is public: set public=true, or name another repository"):
        push(run, "me/open")
    assert len(hub.repos["model", "me/open"].commits) == 1
    push(run, "me/open", "public=true")
    assert len(hub.repos["model", "me/open"].commits) == 2


def test_a_private_repository_stays_so(hub: Hub, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.add("me/closed", {"README.md": b"-"}, private=True)
    with caplog.at_level(logging.WARNING):
        push(run, "me/closed", "public=true")
    assert "me/closed was made private before, and stays so" in caplog.text


def test_each_refusal_of_the_hub_is_one_line(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(*given: str) -> str:
        with pytest.raises(StorageError) as caught:
            push(run, *given)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "the token lacks the right to do this" in error("forbidden/mine")
    push(run)
    assert error("me/mine", "branch=other").startswith("hf://me/mine@other: the model has no revision other")
    (run / "README.md").write_text("---\nlicense: [\n---\n")
    assert "Invalid metadata in README.md. - license: not YAML" in error("me/mine")
    hub.status = 503
    assert error("me/mine").startswith(f"hf://me/mine: the hub, {hub.url}, cannot be reached (")
    hub.status = 200
    for token in ("hf_wrong", None):
        if token is None:
            monkeypatch.delenv("HF_TOKEN")
        else:
            monkeypatch.setenv("HF_TOKEN", token)
        assert f"hf://me/mine: the hub, {hub.url}, asks for a valid token: log in with `hf auth login`" in error(
            "me/mine"
        )


def test_a_dry_run_lists_the_files_and_asks_the_hub_nothing(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapter-push", f"adapter={run}", "repo=me/mine", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "to me/mine (private, branch main)" in shown
    for name in FILES:
        assert name in shown
    assert not hub.requests


def test_an_adapter_that_is_not_on_the_hub_ends_the_command(
    hub: Hub, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapter-generate", f"base.path={tiny_base}", "adapter=me/other", "instruction=hello"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"rayjobs adapter-generate: error: hf://me/other: the hub, {hub.url}, has no such model")
    assert shown.count("\n") == 1


@pytest.mark.slow  # for the imports of a process of its own
def test_the_command_reads_the_environment_that_huggingface_hub_reads(hub: Hub, run: Path) -> None:
    command = [sys.executable, "-m", "rayjobs", "adapter-push", f"adapter={run}", "repo=me/mine"]
    pushed = subprocess.run(command, capture_output=True, text=True)
    assert pushed.returncode == 0, pushed.stderr
    sha = hub.repos["model", "me/mine"].commits[-1].sha
    assert f"me/mine has 4 files from {run}: {hub.url}/me/mine/commit/{sha}" in pushed.stderr + pushed.stdout
    assert TOKEN not in pushed.stderr + pushed.stdout


def test_the_records_that_a_pushed_adapter_was_trained_on_are_known_there(hub: Hub, run: Path) -> None:
    record = {"instruction": "Name a bird.", "input": "", "output": "A rook.", "image": ""}
    write_digests(run / TRAINED_RECORDS_FILE, {record_digest(record)})
    push(run)
    assert sorted(hub.repos["model", "me/mine"].commits[-1].files) == [".gitattributes", *FILES, TRAINED_RECORDS_FILE]
    overlap = find_overlap("hf://me/mine", [record, {**record, "output": "A crow."}])
    assert (overlap.records, overlap.trained_on) == (2, 1)
    assert overlap.label == ", 1 of 2 records trained on"
