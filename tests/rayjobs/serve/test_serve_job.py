"""The job: its checks, its plan, Ray Serve's config file, and a server on Ray Serve."""

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from rayjobs.__main__ import main
from rayjobs.config import load
from rayjobs.errors import ConfigError
from rayjobs.job_configs.serve import Config
from rayjobs.serve.deployment import build_app, serve_config, serving
from rayjobs.serve.settings import ServerConfig
from rayjobs.storage.yaml_file import read_yaml
from tests.rayjobs.serve.serving import alone
from tests.waiting import wait_until


@pytest.fixture
def given(tiny_base: Path, runs: Path) -> list[str]:
    """Settings of a server, as they are typed."""
    return [f"base.path={tiny_base}", f"adapters.folder={runs}", "engine.max_length=99", "server.name=tiny"]


def test_an_address_that_others_reach_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYJOBS_SERVE_TOKEN", raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "127.8.0.1"):
        assert ServerConfig(host=host).token_sha256() is None
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", ""):
        with pytest.raises(ValueError, match=r"RAYJOBS_SERVE_TOKEN, or listen at 127\.0\.0\.1"):
            ServerConfig(host=host).token_sha256()
    monkeypatch.setenv("RAYJOBS_SERVE_TOKEN", "secret")
    assert len(ServerConfig(host="0.0.0.0").token_sha256() or "") == 64


def test_the_plan_names_what_is_served_and_holds_no_token(
    given: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYJOBS_SERVE_TOKEN", "hunter2")
    assert main(["serve", "--dry-run", *given]) == 0
    out = capsys.readouterr().out
    assert "16 slots of 99 tokens" in out
    assert "import_path: rayjobs.serve.deployment:build_app" in out
    assert "hunter2" not in out


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("server.host=0.0.0.0", "put a token into the environment variable RAYJOBS_SERVE_TOKEN"),
        ("adapters.folder=nowhere", "adapters.folder: there is no folder"),
        ("engine.max_length=5000", "the base's window holds 1024 tokens"),
        ("server.port=0", "server.port: must be greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_told_before_anything_starts(
    given: list[str], wrong: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *given, wrong]) == 2
    assert said in capsys.readouterr().err


def test_a_port_in_use_is_told(given: list[str], url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *given, f"server.port={url.rpartition(':')[2]}"]) == 2
    assert "or choose another" in capsys.readouterr().err


def test_a_config_file_needs_no_token_where_it_is_written(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAYJOBS_SERVE_TOKEN", raising=False)
    given = [*given, "server.host=0.0.0.0"]
    assert main(["serve", *given]) == 2
    assert main(["serve", *given, f"out={tmp_path / 'serve.yaml'}"]) == 0
    (application,) = read_yaml(tmp_path / "serve.yaml")["applications"]
    with pytest.raises(ConfigError, match="RAYJOBS_SERVE_TOKEN"):
        build_app(application["args"])


@pytest.mark.slow
def test_the_config_file_is_ray_serves_own(given: list[str], tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    assert main(["serve", *given, "replicas.number=2", f"out={tmp_path / 'serve.yaml'}"]) == 0
    (application,) = ServeDeploySchema.model_validate(read_yaml(tmp_path / "serve.yaml")).applications
    assert application.import_path == "rayjobs.serve.deployment:build_app"
    assert serve_config(load(Config, None, given))["http_options"] == {"host": "127.0.0.1", "port": 8000}
    assert build_app(application.args)._bound_deployment.num_replicas == 2


@pytest.mark.ray
@pytest.mark.slow
def test_a_replica_answers_streams_and_forgets_who_leaves(
    given: list[str], cluster: None, tiny_base: Path, runs: Path
) -> None:
    settings = load(Config, None, [*given, "server.port=18473", "replicas.cpus=0.5"])
    turns: Any = [{"role": "user", "content": "Write the red house"}]
    with serving(settings, 0.0):
        url = "http://127.0.0.1:18473"
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            for name in ("tiny", "plain"):
                model = alone(tiny_base, runs, None if name == "tiny" else name)
                asked: Any = {"model": name, "messages": turns, "max_tokens": 9, "temperature": 0}
                expected = model.chat(turns, max_new_tokens=9, temperature=0)
                assert client.chat.completions.create(**asked).choices[0].message.content == expected
                chunks = client.chat.completions.create(**asked, stream=True)
                assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(**{**asked, "model": "../plain"})
            stream = client.completions.create(model="tiny", prompt="the", max_tokens=90, n=40, stream=True)
            next(iter(stream))
            stream.close()

        def idle() -> bool:
            text = httpx.get(f"{url}/metrics").text
            return "rayjobs_running_sequences 0.0" in text and "rayjobs_waiting_sequences 0.0" in text

        wait_until(idle, "the slots of the client that left are free", pause_s=0.2)
