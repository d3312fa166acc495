"""A run folder holds the settings and the command of its run, without credentials."""

import sys
from pathlib import Path

import pytest

from rayjobs.config import load
from rayjobs.jobs import adapter_train
from rayjobs.runs.record import finish_run, write_result
from rayjobs.runs.run_dir import open_run, versions
from rayjobs.storage.files import read_json
from rayjobs.train.resume_check import PROVENANCE_FILE, lock_run


def test_credentials_of_urls_are_in_no_file_and_do_not_keep_a_run_from_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(user: str) -> None:
        url = f"s3://{user}@bucket/base"
        words = [f"base.path={url}", "data.path=[/a.json]", f"run.storage={tmp_path}", "run.name=r"]
        monkeypatch.setattr(sys, "argv", ["/bin/rayjobs", "adapter-train", *words])
        settings = load(adapter_train.Config, None, words)
        lock_run(settings.run.folder, settings, {"base": {"path": url}}, ())
        (folder / "train" / "checkpoint_00000001").mkdir(parents=True, exist_ok=True)
        open_run(settings.run, settings)
        finish_run(folder, "adapter-train", "failed", f"{url} cannot be read: 403")

    folder = tmp_path / "r"
    begin("key:secret")
    begin("other:secret")  # a new key for the same bucket
    files = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
    assert {"config.yaml", "run.json", PROVENANCE_FILE} <= set(files)
    assert not [name for name, text in files.items() if "secret" in text or "key:" in text]
    for name in ("config.yaml", "run.json", PROVENANCE_FILE):
        assert "s3://***@bucket/base" in files[name]


def test_a_result_holds_no_credentials(tmp_path: Path) -> None:
    write_result(tmp_path, {"headline": "done", "list": "s3://key:secret@bucket/list.json", "rows": [{"at": 1.5}]})
    assert read_json(tmp_path / "result.json") == {
        "headline": "done",
        "list": "s3://***@bucket/list.json",
        "rows": [{"at": 1.5}],
    }


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert versions()["commit"] == "unknown"
