"""Paths on the Hugging Face hub, against a server that speaks its API over a socket."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from rayjobs.errors import ConfigError, StorageError
from rayjobs.storage.hub import HubPath, hub_copy, hub_snapshot, is_hub_id, pin
from tests.hub_server import TOKEN, Hub, serve_hub, use_hub

WEIGHTS = bytes(range(256)) * 16
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "sub/notes [1].txt": b"notes"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub() as hub:
        use_hub(hub.url, str(tmp_path / "home"), monkeypatch)
        yield hub


def test_a_snapshot_has_the_files_of_a_revision_and_is_fetched_once(hub: Hub) -> None:
    first = hub.add("org/model", FILES)
    folder = hub_snapshot("org/model")
    assert {file: (folder / file).read_bytes() for file in FILES} == FILES
    assert folder.name == first
    second = hub.repos["model", "org/model"].commit({"config.json": b"[]"})
    assert hub_snapshot("org/model", revision="v1") == folder
    assert (hub_snapshot("org/model") / "config.json").read_bytes() == b"[]"
    assert pin("hf://org/model") == f"hf://org/model@{second}"
    assert pin("hf://org/model@v1/config.json") == f"hf://org/model@{first}/config.json"
    hub.requests.clear()
    assert hub_copy(HubPath.parse(f"hf://org/model@{first}")) == folder
    assert pin(f"hf://org/model@{first}") == f"hf://org/model@{first}"
    assert not hub.requests, "a commit that is in the cache needs no request"


def test_patterns_and_files_fetch_nothing_else(hub: Hub) -> None:
    hub.add("org/model", FILES)
    hub.add("org/records", {"a.jsonl": b"1", "b.jsonl": b"2"}, kind="dataset")
    assert [path.name for path in hub_snapshot("org/model", allow_patterns=["*.json"]).iterdir()] == ["config.json"]
    assert hub_copy(HubPath.parse("hf://org/model/sub/notes [1].txt")).read_bytes() == b"notes"
    assert [path.name for path in hub_copy(HubPath.parse("hf://org/model/sub")).iterdir()] == ["notes [1].txt"]
    assert hub_copy(HubPath.parse("hf://datasets/org/records/b.jsonl")).read_bytes() == b"2"
    assert hub.fetched() == ["config.json", "notes [1].txt", "b.jsonl"]
    with pytest.raises(FileNotFoundError, match=r"hf://org/model/nowhere.json: the repository has no such file"):
        hub_copy(HubPath.parse("hf://org/model/nowhere.json"))


def test_each_refusal_is_one_line_with_the_way_out(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", FILES)
    hub.add("org/secret", FILES, private=True)
    hub.add("org/gated", FILES, gated=True)

    def error(repo_id: str, revision: str | None = None) -> str:
        with pytest.raises(StorageError) as caught:
            hub_snapshot(repo_id, revision=revision)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for repo_id in ("org/nowhere", "org/secret"):
        assert error(repo_id).startswith(f"hf://{repo_id}: the hub, {hub.url}, has no such model, or it is private:")
        with pytest.raises(StorageError, match="has no such model"):
            pin(f"hf://{repo_id}")
    assert f"gated: accept its terms at {hub.url}/org/gated, then log in with `hf auth login`" in error("org/gated")
    assert error("org/model", "v7") == (
        "hf://org/model@v7: the model has no revision v7: give a branch, a tag or a commit"
    )
    assert "Repo id must" in error("org/--model") or "Cannot have --" in error("org/--model")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "asks for a valid token: log in with `hf auth login`, or set HF_TOKEN" in error("org/secret")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for repo_id in ("org/secret", "org/gated"):
        assert (hub_snapshot(repo_id) / "model.safetensors").read_bytes() == WEIGHTS


def test_without_the_hub_its_cache_serves(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sha = hub.add("org/model", FILES)
    hub.add("org/other", FILES)
    folder = hub_snapshot("org/model")
    hub_snapshot("org/other", allow_patterns=["*.json"])
    hub.status = 503
    assert hub_snapshot("org/model") == folder
    assert pin("hf://org/model") == f"hf://org/model@{sha}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert hub_snapshot("org/model") == folder
    assert pin("hf://org/model") == f"hf://org/model@{sha}"
    for repo_id in ("org/other", "org/nowhere"):
        with pytest.raises(StorageError, match=f"{tmp_path}.* holds no complete copy, and HF_HUB_OFFLINE forbids"):
            hub_snapshot(repo_id)
    assert not hub.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert pin("hf://org/model") == f"hf://org/model@{sha}"
    with pytest.raises(
        StorageError, match=r"no complete copy, and the hub, http://127\.0\.0\.1:9, cannot be reached \("
    ):
        pin("hf://org/nowhere")


def test_what_a_path_on_the_hub_is() -> None:
    for text in (
        "hf://org/name",
        "hf://org/name@v1",
        "hf://org/name@refs/pr/3/a/b.gguf",
        "hf://datasets/org/na.me/a b",
    ):
        assert str(HubPath.parse(text)) == text
    assert HubPath.parse("hf://org/name@refs/pr/3/a/b.gguf") == HubPath("org/name", "model", "refs/pr/3", "a/b.gguf")
    for text in ("hf://name", "hf://org/../name", "hf://", "hf://org/name@", "hf://org name/x"):
        with pytest.raises(ConfigError, match="a path on the hub is hf://org/name"):
            HubPath.parse(text)
    assert is_hub_id("org/name@v1.0")
    for text in ("./org/name", "../name", "/org/name", "~/name", "org/name/more", "name", "a b/c", "https://org/name"):
        assert not is_hub_id(text)
