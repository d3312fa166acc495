"""The command line as a user meets it: help, plans, and one line for everything that is wrong."""

import errno
import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from huggingface_hub import constants

import adapter
import cafo
import rayjobs
from rayjobs.__main__ import JOBS, READER_LEFT, main
from tests.conftest import ROOT
from tests.waiting import PATIENCE_S


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def given(tiny_base: Path, records: Path, tmp_path: Path) -> dict[str, str]:
    return {
        "base.path": str(tiny_base),
        "data.path": f"[{records}]",
        "adapter.n_layers": "2",
        "run.name": "r",
        "run.storage": str(tmp_path / "runs"),
    }


@pytest.mark.parametrize("job", JOBS)
def test_help_tells_every_field_with_its_default(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, job, "--help")
    assert code == 0
    assert "run.name  (text, " in out or "sweep  (path, required)" in out or job in ("adapter-push", "serve")
    assert "--dry-run" in out


QUICK = {
    "--version": "rayjobs ",
    "--help": "adapter-train",
    **{f"{job} --help": "--dry-run" for job in JOBS},
    "adapter-train --config alpaca_7b train.epoch=3": "did you mean train.epochs?",
    "cafo data.rot=3": "did you mean data.root?",
    "adapter-train --config alpaca_7 train.epoch=3": "did you mean alpaca_7b?",
    "adapter-trian": "did you mean adapter-train?",
    "configs": "alpaca_7b\tadapter-train\tThe paper's recipe: 5 epochs of Alpaca-52K on LLaMA-7B",
}
"""Commands that are answered at once, and a part of each answer."""


def test_help_and_faults_of_settings_import_nothing_that_takes_long() -> None:
    script = (
        "import sys\nfrom rayjobs.__main__ import main\nfor command in sys.argv[1:]:\n"
        "    try: main(command.split())\n    except SystemExit: pass\n"
        "print('imported', *sorted({'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, *QUICK], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["imported"]
    for command, said in QUICK.items():
        assert said in done.stdout + done.stderr, command


def test_the_versions_are_those_of_the_installed_package() -> None:
    assert rayjobs.__version__ == adapter.__version__ == cafo.__version__ == metadata.version("rayjobs")
    for package in (rayjobs, adapter, cafo):
        with pytest.raises(AttributeError, match="no attribute 'version'"):
            package.version  # noqa: B018


def test_a_dry_run_says_nothing_of_clusters_unless_it_is_asked_for_one(
    given: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["adapter-train", "--dry-run", *(f"{name}={value}" for name, value in given.items())]
    monkeypatch.setenv("RAY_AUTH_MODE", "")  # what --submit makes of it is not for the tests after this one
    monkeypatch.setattr("rayjobs.__main__.submit", lambda _: pytest.fail("a dry run submits nothing"))
    _, out, err = run(capsys, *words)
    assert "cluster" not in out + err
    code, out, err = run(capsys, *words, "--submit")
    assert (code, err) == (0, "")
    assert "on a cluster: " in out
    assert "ray job submit --working-dir . -- python -m rayjobs adapter-train base.path=" in out


def test_help_of_adapter_train_names_units_and_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    _, out, _ = run(capsys, "adapter-train", "--help")
    assert out.count("Train an adapter on a frozen LLaMA: tokenize the records") == 1
    assert max(map(len, out.split("\nbase: ")[1].splitlines())) <= 100
    assert "\ntrain: Training recipe. The defaults are those of LLaMA-Adapter on Alpaca.\n  train.epochs" in out
    assert "base.path  (path or hub id, required)" in out
    assert "train.global_batch  (int ≥ 1, default 64)\n      Records per optimizer step, over all workers." in out


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    given: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "adapter-train", "--dry-run", *(f"{name}={value}" for name, value in given.items()))
    assert code == 0
    assert "trainable parameters" in out
    assert "512" not in out.split("trainable parameters")[1].split("\n")[0]
    assert f"{2 * (10 * 24 + 6):,}" in out
    assert not (tmp_path / "runs").exists()


class _Bomb:
    def __reduce__(self) -> tuple:
        return (os.system, ("touch exploded",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.path": "[none.json]"}, "none.json: no such file"),
        ({"train.epoch": "3"}, "train.epoch: unknown key; did you mean train.epochs?"),
        ({"train.epochs": "many"}, "train.epochs: must be a valid number"),
        ({"adapter.n_layers": "31"}, "adapter.n_layers is 31, but"),
        ({"base.path": "nowhere"}, "nowhere"),
        (
            {"data.template": "nowhere"},
            "template is nowhere, which is no file, nor one of chat, alpaca, scienceqa, plain",
        ),
        ({"data.path": "[]"}, "data.path is empty: name at least one file of records"),
        ({"data.path": "empty.jsonl.gz"}, "empty.jsonl.gz: no records"),
        ({"data.path": "page.json"}, "page.json: an HTML page"),
        ({"run.storage": "page.json"}, "page.json, a file: give a folder, which is made if there is none"),
        ({"base.path": "page.json"}, "page.json: neither a GGUF file nor a folder"),
        ({"base.path": "cut.gguf"}, "cut.gguf: not a readable GGUF file, truncated or corrupt"),
        ({"base.tokenizer": "plain"}, "neither tokenizer.json nor tokenizer.model is in this folder"),
        ({"base.path": "org/none"}, "hf://org/none: "),
        ({"data.path": "[http://127.0.0.1:1/a.json]"}, "http://127.0.0.1:1/a.json cannot be reached: Cannot connect"),
    ],
    ids=[
        "file",
        "key",
        "type",
        "layers",
        "base",
        "template",
        "no data",
        "empty",
        "HTML",
        "storage",
        "no base",
        "cut",
        "tokenizer",
        "offline",
        "refused",
    ],
)
def test_bad_input_is_one_line_that_names_the_place(
    given: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "page.json").write_text("<!DOCTYPE html><html><body>404</body></html>")
    (tmp_path / "plain").mkdir()
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0\1")
    words = [f"{name}={value}" for name, value in {**given, **change}.items()]
    code, out, err = run(capsys, "adapter-train", *words, "--dry-run")
    assert (code, out) == (2, "")
    assert run(capsys, "adapter-train", *words) == (code, out, err)
    assert err.count("\n") == 1
    assert err.startswith("rayjobs adapter-train: error: ")
    assert message in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("[1]", "a.json, item 1: a record must be an object"),
        ("[1,", "a.json, item 2: malformed JSON: the file ends within it"),
        ('[\n{"instruction" 1}]', "a.json, item 1: malformed JSON"),
        ('[{"instruction": "i"}]', "a.json, item 1: the record has no 'output'"),
    ],
    ids=["record", "cut", "json", "output"],
)
def test_records_that_workers_refuse_are_one_line_that_names_the_place(
    cluster: None,
    given: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    written: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text(written)
    given["data.path"] = "[a.json]"
    code, out, err = run(capsys, "adapter-train", *(f"{name}={value}" for name, value in given.items()))
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if not line.startswith(("records: ", "tokenize: 1 records"))]
    assert line.startswith("rayjobs adapter-train: error: ")
    assert message in line


@pytest.mark.parametrize(
    "page", ["<!DOCTYPE html><html><style>a {color: red}</style></html>", "<html>\n<p>404: none</p>"]
)
def test_a_page_in_place_of_a_config_is_named(page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(page)
    code, _, err = run(capsys, "adapter-train", "--config", str(tmp_path / "config.yaml"))
    assert (code, err.count("\n")) == (2, 1)
    assert f"{tmp_path}/config.yaml: an HTML page" in err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write into")
def test_a_folder_that_cannot_be_made_is_named_with_the_way_out(
    given: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    given["run.storage"] = "/proc/none"
    commands = [
        ("example-data", "/proc/none"),
        ("adapter-train", *(f"{name}={value}" for name, value in given.items())),
    ]
    for words in commands:
        code, _, err = run(capsys, *words)
        assert (code, err.count("\n")) == (2, 1)
        assert f"rayjobs {words[0]}: error: the folder /proc/none" in err
        assert "cannot be made: no such file or directory; name one where you may write" in err


def test_who_has_no_examples_yet_is_told_what_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        ("adapter-train", "--config", "notes"),
        *(("adapter-tune", "--config", name) for name in ("methods", "search")),
    ):
        code, _, err = run(capsys, *words, "--dry-run")
        assert (code, err.count("\n")) == (2, 1)
        assert err.endswith("; `rayjobs example-data` makes ./examples\n")


def test_an_error_of_the_system_is_told_without_its_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", "/a", None, "/b")

    monkeypatch.setattr("rayjobs.__main__.list_runs", fail)
    assert run(capsys, "runs")[2] == "rayjobs runs: error: /a to /b: permission denied\n"


def test_with_verbose_an_error_of_the_user_shows_where_it_was_raised(
    given: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", dict(os.environ))  # --verbose is passed on to workers there
    given["adapter.n_layers"] = "31"
    words = [f"{name}={value}" for name, value in given.items()]
    code, _, err = run(capsys, "adapter-train", "--verbose", *words)
    assert code == 2
    assert "Traceback (most recent call last)" in err
    assert "adapter.n_layers is 31, but" in err.splitlines()[-1]
    monkeypatch.setenv("RAYJOBS_VERBOSE", "0")
    assert "Traceback" not in run(capsys, "adapter-train", *words)[2]


@pytest.mark.parametrize("name", [".", "..", "...", "a/..", "a/b", "/tmp/a", "", "a b", "a\n", "C:\\a"])
def test_a_run_name_that_is_not_a_folder_in_the_storage_is_refused(
    given: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    given["run.name"] = name
    code, _, err = run(capsys, "adapter-train", *(f"{key}={value}" for key, value in given.items()))
    assert code == 2
    assert "run.name: must be the name of a folder in run.storage" in err
    assert not (tmp_path / "runs").exists()


def test_a_run_in_the_folder_of_prepared_data_is_refused(
    given: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    given["run.name"] = "cache"
    code, _, err = run(capsys, "adapter-train", *(f"{key}={value}" for key, value in given.items()))
    assert code == 2
    assert "run.name is cache, but " in err


TWICE = """
import atexit, sys, time
from rayjobs import __main__

def rest(*_):
    print("resting", flush=True)
    time.sleep(600)

def run_job(args):
    try:
        rest()
    finally:
        if sys.argv[1] == "cleaning up":
            rest()

if sys.argv[1] == "shutting down":
    atexit.register(rest)
__main__.run_job = run_job
sys.exit(__main__.main(["adapter-train"]))
"""


@pytest.mark.parametrize("busy", ["cleaning up", "shutting down"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_ends_at_once_in_one_line(busy: str, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", TWICE, busy], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline() == "resting\n"
        process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    (line,) = err.split("\n")[1:-1]
    assert "the same command resumes" in line


def test_a_list_of_runs_has_a_plain_line_for_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"job": "adapter-train", "state": "failed", "started": "2026-01-02T03:04:05+00:00"}
    record["error"] = "\x1b[36mray::Worker\x1b[39m failed\tat http://user:secret@host"
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text(json.dumps(record))
    code, out, _ = run(capsys, "runs", str(tmp_path))
    assert code == 0
    assert out == "r\tadapter-train\tfailed\t2026-01-02 03:04:05\tray::Worker failed at http://***@host\n"


def test_a_tokenizer_that_does_not_fit_the_vocabulary(
    given: dict[str, str], trained_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given["base.tokenizer"] = str(trained_llama / "tokenizer.model")
    code, _, err = run(capsys, "adapter-train", *(f"{name}={value}" for name, value in given.items()))
    assert code == 2
    assert "512" in err
    assert "97" in err


def test_a_pickle_that_wants_to_run_code_does_not(
    given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "meta"
    base.mkdir()
    (base / "params.json").write_text('{"dim": 24, "n_layers": 3, "n_heads": 6, "vocab_size": 97}')
    (base / "consolidated.00.pth").write_bytes(pickle.dumps({"norm.weight": _Bomb()}, protocol=2))
    given["base.path"] = str(base)
    code, _, err = run(capsys, "adapter-train", *(f"{name}={value}" for name, value in given.items()))
    assert code == 2
    assert "consolidated.00.pth" in err
    assert not (tmp_path / "exploded").exists()


def test_overrides_may_stand_behind_options_and_unknown_options_are_refused(
    tiny_base: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["adapter-train", f"base.path={tiny_base}", f"data.path=[{records}]", "run.name=a", "--dry-run"]
    assert main([*given, "adapter.n_layers=2", f"run.storage={tmp_path}"]) == 0
    assert str(tmp_path) in capsys.readouterr().out.replace("\n", "").replace(" ", "")
    with pytest.raises(SystemExit):
        main([*given, "--sumbit"])
    message = capsys.readouterr().err
    assert message.startswith("usage: rayjobs adapter-train")
    assert "unrecognized arguments: --sumbit; did you mean --submit?" in message


@pytest.mark.parametrize(("words", "message"), [
    ([], "no job is named: give one of adapter-train, adapter-eval"),
    (["trian"], "'trian' is not a job: give one of adapter-train, adapter-eval"),
    (["adapter_train"], "'adapter_train' is not a job: did you mean adapter-train?"),
    (["eval"], "'eval' is not a job: did you mean adapter-eval or cafo-eval?"),
    (["--config", "a.yaml"], "'--config' is not a job"),
    (["adapter-train", "--train.epochs", "3"], "--train.epochs; settings are given as section.key=value, without dash"),
    (["report", "run", "--outt", "x"], "unrecognized arguments: --outt x; did you mean --out?"),
    (["runs", "a", "b"], "unrecognized arguments: b"),
])  # fmt: skip
def test_a_command_line_that_names_no_job_or_option_says_what_there_is(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_comparison_is_not_written_over_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "report", str(tmp_path), str(tmp_path), "--out", str(tmp_path))
    assert (code, err.count("\n")) == (2, 1)
    assert f"{tmp_path} is a folder: give the file to write" in err


def test_the_module_runs_and_exits_with_the_code() -> None:
    done = subprocess.run([sys.executable, "-m", "rayjobs", "adapter-train"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"rayjobs adapter-train: error: {name}: required, but not given"
        for name in ("base.path", "data.path", "run.name")
    ]


@pytest.mark.parametrize("words", ["adapter-train --help", "configs"])
def test_a_reader_that_leaves_early_is_no_error(words: str) -> None:
    line = f"set -o pipefail; {sys.executable} -m rayjobs {words} | true"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (READER_LEFT, "")


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 2), (errno.EMFILE, 2), (errno.EBADF, None)])
def test_a_full_disk_is_one_message_and_a_fault_keeps_its_traceback(
    number: int, code: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("rayjobs.__main__.list_runs", fail)
    if code is None:
        with pytest.raises(OSError, match="Bad file descriptor"):
            main(["runs"])
    else:
        assert main(["runs"]) == code
