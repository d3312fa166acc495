"""The configs of the package: found by name from anywhere, listed and copied."""

from pathlib import Path

import pytest

from rayjobs.__main__ import JOBS, main
from rayjobs.cluster.job_submission import job_command
from rayjobs.errors import ConfigError, UserError
from rayjobs.job_configs.adapter_train import Config
from rayjobs.shipped_configs import FOLDER, copy_config, find_config, list_configs


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_list_has_every_config_of_a_job_once() -> None:
    configs = list_configs()
    files = {path for path in FOLDER.rglob("*.yaml") if path.parent.name != "cluster"}
    assert {config.path for config in configs} == files
    assert len({config.name for config in configs}) == len(configs)
    assert {config.job for config in configs} <= set(JOBS)
    assert all(len(config.summary) > 20 and config.summary.endswith(".") for config in configs)


def test_a_name_is_a_file_first_and_then_a_config_of_the_package(tmp_path: Path) -> None:
    assert find_config("alpaca_7b") == FOLDER / "adapter" / "alpaca_7b.yaml"
    (tmp_path / "alpaca_7b").write_text("train: {epochs: 2}\n")
    assert find_config("alpaca_7b") == Path("alpaca_7b")
    assert find_config("no/such.yaml") == Path("no/such.yaml")
    with pytest.raises(ConfigError, match=r"^alpaca7b: neither a file nor .*; did you mean alpaca_7b\?$"):
        find_config("alpaca7b")
    with pytest.raises(ConfigError, match="`rayjobs configs` lists them"):
        find_config("zzz")


def test_a_copy_replaces_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "copy", "alpaca_7b"]) == 0
    assert capsys.readouterr().out == "alpaca_7b.yaml\n"
    assert (tmp_path / "alpaca_7b.yaml").read_bytes() == (FOLDER / "adapter" / "alpaca_7b.yaml").read_bytes()
    assert main(["configs", "copy", "alpaca_7b"]) == 2
    assert "alpaca_7b.yaml exists" in capsys.readouterr().err
    assert copy_config("dtd", tmp_path / "mine.yaml") == tmp_path / "mine.yaml"
    for words, message in (["copy"], "name the config to copy"), (["copy", "dtdd"], "did you mean dtd?"):
        assert main(["configs", *words]) == 2
        assert message in capsys.readouterr().err


def test_a_cluster_is_given_the_name_of_a_config_of_the_package() -> None:
    overrides = ["base.path=s3://b/c", "data.path=s3://b/d", "run.storage=s3://b/r"]
    command = job_command("adapter-train", Config, "alpaca_7b", overrides)
    assert command == ["python", "-m", "rayjobs", "adapter-train", "--config", "alpaca_7b", *overrides]
    with pytest.raises(UserError, match="is not below"):
        job_command("adapter-train", Config, str(FOLDER / "adapter" / "alpaca_7b.yaml"), overrides)
