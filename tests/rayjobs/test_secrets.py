"""No secret, wherever it was given, stands in a file of a run, in the log or in the report."""

import json
import logging
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rayjobs.__main__ import main
from rayjobs.config import config
from rayjobs.console import setup_logging
from rayjobs.data.rejected import write_rejected
from rayjobs.lifecycle import job
from rayjobs.runs.provenance import lock_provenance
from rayjobs.runs.record import write_result
from rayjobs.runs.run_dir import RunConfig, open_run

MARK = "s3cr3t"
"""Every secret holds it."""
URL = f"https://user:{MARK}-password@host/a?sig={MARK}-signature&key={MARK}-key"


def files_with_secrets(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and MARK.encode() in path.read_bytes()]


@config
class Config:
    JOB: ClassVar = "test-secrets"
    data: str = URL
    env: dict[str, str]
    options: dict[str, Any]
    run: RunConfig


@pytest.mark.parametrize("fails", [False, True])
def test_of_a_job_in_settings_command_results_lists_logs_and_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: bool
) -> None:
    monkeypatch.setenv("SOME_API_KEY", f"{MARK} of a variable")
    monkeypatch.setattr(sys, "argv", ["/bin/rayjobs", "test-secrets", f"data={URL}", f"env.SERVICE_TOKEN={MARK}-word"])
    setup_logging()
    told = f"{URL} refused Authorization: Bearer {MARK}-in-a-header and {MARK} of a variable"

    @job
    def run(settings: Config) -> dict[str, Any]:
        folder = open_run(settings.run, settings)
        lock_provenance(folder / "source.json", {"data": settings.data, "options": settings.options})
        write_rejected(folder, [{"path": URL, "reason": told}])
        write_result(folder, {"headline": told, "rows": [{"password": f"{MARK}-result"}]})
        logging.getLogger("rayjobs.test").warning("%s", told)
        if fails:
            raise ValueError(told)
        return {"from": URL}

    settings = Config(
        env={"SERVICE_TOKEN": f"{MARK}-setting"},
        options={"client": {"api_key": f"{MARK}-option"}, "words": f"--token={MARK}-word"},
        run=RunConfig(name="r", storage=str(tmp_path)),
    )
    if fails:
        with pytest.raises(ValueError, match="refused"):
            run(settings)
    else:
        run(settings)
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert {"config.yaml", "run.json", "source.json", "rejected.jsonl", "result.json", "report.html"} <= names
    assert not files_with_secrets(tmp_path)
    shown = capsys.readouterr()
    assert "refused" in shown.err
    assert MARK not in shown.err + shown.out


class Refusing(BaseHTTPRequestHandler):
    """A server whose refusals repeat what it was sent."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        message = f"incorrect key {self.headers['Authorization']} at http://u:{MARK}@host{self.path}"
        content = json.dumps({"error": {"message": message}}).encode()
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    """The address of such a server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_of_an_endpoint_that_refuses(
    refusing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", f"{MARK}-of-the-endpoint")
    given = [
        "cafo-prompt",
        "source=endpoint",
        "class_names=[emu]",
        "endpoint.model=gpt",
        "endpoint.retries=0",
        f"endpoint.base_url={refusing.replace('://', f'://user:{MARK}-password@')}?token={MARK}-query",
        f"run.storage={tmp_path}",
        "run.name=r",
    ]
    monkeypatch.setattr(sys, "argv", ["/bin/rayjobs", *given])
    assert main(given) == 2
    assert (tmp_path / "r" / "report.html").is_file()
    assert not files_with_secrets(tmp_path)
    shown = capsys.readouterr()
    assert "error: gpt at " in shown.err
    assert MARK not in shown.err + shown.out
