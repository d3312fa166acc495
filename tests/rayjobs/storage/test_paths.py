"""URLs serve as local paths do, proven on a real S3 server that speaks over a socket."""

import platform
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import s3fs

from adapter.tokenizers.load import load_tokenizer
from rayjobs.__main__ import main
from rayjobs.cluster.shared_storage import assert_shared_storage
from rayjobs.config import load
from rayjobs.data.feature_decoding import PartTask
from rayjobs.data.feature_encoding import PartEncoder
from rayjobs.data.records import RecordsConfig
from rayjobs.errors import DataError, StorageError
from rayjobs.jobs import adapter_eval, adapter_train
from rayjobs.models.base_model import BaseModelConfig
from rayjobs.runs.record import find_runs
from rayjobs.storage import sync
from rayjobs.storage.download import cached_path
from rayjobs.storage.files import (
    atomic_path,
    read_json,
    read_jsonl,
    read_parquet,
    write_json,
    write_jsonl,
    write_parquet,
)
from rayjobs.storage.fingerprint import file_fingerprint
from rayjobs.storage.paths import remove_folder, resolve_path
from rayjobs.storage.sync import SyncedFolder
from rayjobs.storage.yaml_file import read_yaml
from tests.rayjobs.conftest import upload
from tests.rayjobs.jobs.test_adapter_train import settings
from tests.waiting import PATIENCE_S, wait_until


def test_a_local_path_stays_a_plain_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_path("a/b") == tmp_path / "a" / "b"
    assert type(resolve_path("a/b")) is type(Path())
    assert cached_path("a/b") == Path("a/b")


def test_what_is_written_is_read_and_is_there_whole_or_not_at_all(bucket: str) -> None:
    write_json(f"{bucket}/run/result.json", {"loss": 0.5})
    assert read_json(resolve_path(bucket) / "run" / "result.json") == {"loss": 0.5}
    rows = [{"step": step, "loss": "ü" * step} for step in range(40)]
    write_jsonl(f"{bucket}/rows.jsonl", rows)
    assert read_jsonl(f"{bucket}/rows.jsonl") == rows
    last = read_jsonl(f"{bucket}/rows.jsonl", last_bytes=300)
    assert last == read_jsonl(cached_path(f"{bucket}/rows.jsonl"), last_bytes=300) == rows[-len(last) :]
    table = pa.table({"a": [1, 2, 3], "b": ["x", "y", "z"]})
    write_parquet(f"{bucket}/part.parquet", table)
    assert read_parquet(f"{bucket}/part.parquet", columns=["b"]) == table.select(["b"])

    def stop_half_way() -> None:
        with atomic_path(f"{bucket}/half.txt") as temporary:
            temporary.write_text("half")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        stop_half_way()
    assert sorted(path.name for path in resolve_path(bucket).iterdir()) == ["part.parquet", "rows.jsonl", "run"]
    remove_folder(resolve_path(bucket) / "run")
    assert not (resolve_path(bucket) / "run" / "result.json").exists()


@pytest.mark.parametrize("read", [read_json, read_jsonl, read_yaml])
def test_a_file_that_is_replaced_meanwhile_is_read_whole(
    bucket: str, monkeypatch: pytest.MonkeyPatch, read: Callable[[str], Any]
) -> None:
    """One request gets it, of whatever version: a second one, or one of the version seen first, may find it gone."""
    write_json(f"{bucket}/state", {"a": 1})
    got, send = [], s3fs.S3FileSystem._call_s3

    async def count(files: s3fs.S3FileSystem, method: str, *arguments: Any, **options: Any) -> Any:
        if method == "get_object":
            got.append(options.keys() & {"Range", "IfMatch"})
        return await send(files, method, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", count)
    with suppress(DataError):  # an object over several lines is none of JSONL's
        assert read(f"{bucket}/state") == {"a": 1}
    assert got == [set()]


def test_another_process_sees_what_was_written_since(bucket: str) -> None:
    path = resolve_path(bucket) / "parts" / "00.parquet"
    assert not path.exists()
    assert not list(resolve_path(bucket).glob("parts/*"))
    write_json(f"{bucket}/parts/00.parquet", 1)
    assert path.exists()
    assert [found.name for found in resolve_path(bucket).glob("parts/*")] == ["00.parquet"]


def test_a_copy_is_made_once_for_each_content(bucket: str, tiny_base: Path) -> None:
    upload(tiny_base, f"{bucket}/base")
    copy = cached_path(f"{bucket}/base")
    assert {path.name: file_fingerprint(path) for path in copy.iterdir()} == {
        path.name: file_fingerprint(path) for path in tiny_base.iterdir()
    }
    made = (copy / "model.safetensors").stat().st_mtime_ns
    assert (cached_path(f"{bucket}/base") / "model.safetensors").stat().st_mtime_ns == made
    (resolve_path(bucket) / "base" / "config.json").write_text("{}")
    assert (cached_path(f"{bucket}/base") / "config.json").read_text() == "{}"
    assert (copy / "config.json").read_text() != "{}", "whoever reads the old content goes on with it"
    with pytest.raises(FileNotFoundError, match=r"nowhere: there is no such file"):
        cached_path(f"{bucket}/nowhere")


def test_a_copy_that_a_killed_process_left_half_made_goes(bucket: str, tmp_path: Path) -> None:
    write_json(f"{bucket}/base/config.json", {})
    copy = cached_path(f"{bucket}/base")
    assert [path.name for path in copy.iterdir()] == ["config.json"]
    half = copy.parent / "unfinished" / "base" / "model.safetensors"
    copy.rename(tmp_path / "away")
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    assert [path.name for path in cached_path(f"{bucket}/base").iterdir()] == ["config.json"]
    assert not half.exists()


def test_a_base_and_records_are_read_from_a_url(bucket: str, tiny_base: Path, records: Path) -> None:
    upload(tiny_base, f"{bucket}/base")
    upload(records.parent, f"{bucket}/data")
    checkpoint, tokenizer = BaseModelConfig(path=f"{bucket}/base").open()
    assert str(tokenizer) == f"{bucket}/base"
    assert load_tokenizer(cached_path(tokenizer)).sha256 == load_tokenizer(tiny_base / "tokenizer.model").sha256
    assert checkpoint.config.n_layers == 3
    (there,) = RecordsConfig(path=[f"{bucket}/data/records.jsonl"]).sources()
    (here,) = RecordsConfig(path=[str(records)]).sources()
    assert list(there.read()) == list(here.read())
    assert there.digests() == here.digests()


def test_what_grows_is_sent_whole_and_goes_on_from_what_was_sent(bucket: str, tmp_path: Path) -> None:
    for folder in (tmp_path, resolve_path(bucket)):
        with SyncedFolder(folder) as grown, grown.fetch("rows.jsonl").open("a") as file:
            file.write('{"step": 1}\n')
            (grown.local / "events").mkdir()
            (grown.local / "events" / "0").write_text("one")
        with SyncedFolder(folder) as grown:
            with grown.fetch("rows.jsonl").open("a") as file:
                file.write('{"step": 2}\n')
            grown.send(now=True)
            assert [row["step"] for row in read_jsonl(folder / "rows.jsonl")] == [1, 2]
        assert (folder / "events" / "0").read_text() == "one"


def test_what_could_not_be_sent_is_sent_again(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Path, to: Path) -> None:
        raise OSError(f"{to} cannot be written")

    with SyncedFolder(resolve_path(bucket)) as grown:
        grown.fetch("rows.jsonl").write_text("one")
        with monkeypatch.context() as patch:
            patch.setattr(sync, "upload_file", fail)
            with pytest.raises(OSError, match="cannot be written"):
                grown.send(now=True)
        grown.send(now=True)
        assert (resolve_path(bucket) / "rows.jsonl").read_text() == "one"


def test_a_worker_that_does_not_see_the_drivers_folder_says_so(tmp_path: Path) -> None:
    assert_shared_storage(tmp_path, "s3://bucket/runs")
    with pytest.raises(ValueError, match=rf"{tmp_path}/runs is not the same folder on {platform.node()}: .* or URLs"):
        assert_shared_storage(tmp_path, tmp_path / "runs")
    task = PartTask(
        root="",
        first=0,
        paths=[],
        views=0,
        seed=0,
        min_area=1.0,
        flips=False,
        outputs={"clip": f"{tmp_path}/runs/part-0"},
    )
    with pytest.raises(ValueError, match="is not the same folder"):
        PartEncoder({}, 1, "cpu")(pa.Table.from_pylist([task.to_row()]))


def test_a_list_is_sent_after_the_images_that_it_names(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(sync, "upload_file", lambda file, to: sent.append(file.name))
    with SyncedFolder(resolve_path(bucket)) as grown:
        for folder in ("zz", "aa"):
            for name in (f"{folder}.json", f"{folder}/1.png"):
                (grown.local / name).parent.mkdir(exist_ok=True)
                (grown.local / name).write_text(name)
    assert set(sent[:2]) == {"1.png"}
    assert set(sent[2:]) == {"aa.json", "zz.json"}
    assert not grown.local.exists()


def test_runs_are_found(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, started in (("old", "2026-01-01"), ("new", "2026-02-01")):
        run = {"job": "adapter-train", "state": "done", "started": f"{started}T00:00:00+00:00"}
        write_json(f"{bucket}/{name}/run.json", run)
        write_json(f"{bucket}/{name}/result.json", {"headline": f"the {name} one"})
    assert [path.name for path in find_runs(resolve_path(bucket))] == ["new", "old"]
    assert main(["runs", bucket]) == 0
    assert main(["report", f"{bucket}/new"]) == 0
    assert "the new one" in capsys.readouterr().out
    assert "the new one" in (resolve_path(bucket) / "new" / "report.html").read_text()


def test_what_cannot_be_reached_or_read_there_is_told_in_one_line(
    s3: str, tiny_base: Path, records: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def error(job: str, *given: str) -> str:
        assert main([job, *given, "run.name=r"]) == 2
        return capsys.readouterr().err.splitlines()[0]

    base = f"base.path={tiny_base}"
    assert "s3://test/none.jsonl: there is no such file" in error(
        "adapter-eval", base, "data.path=[s3://test/none.jsonl]"
    )
    assert "no folder s3://test/x/dtd; put dtd there in CoOp's layout" in error(
        "cafo-features", "encoders.a.kind=pixels", "data={root: s3://test/x, name: dtd}"
    )
    assert "run.storage: must be a local path, not a URL: mount" in error("demo", "run.storage=s3://test/runs")
    assert "ftpx://x/y.jsonl: Protocol not known: ftpx; did you mean ftp://?" in error(
        "adapter-eval", base, "data.path=[ftpx://x/y.jsonl]"
    )
    for protocol, package in (("gs", "gcsfs"), ("az", "adlfs")):
        monkeypatch.setitem(sys.modules, package, None)
        url = f"{protocol}://x/y.jsonl"
        assert f"{url}: " in (message := error("adapter-eval", base, f"data.path=[{url}]"))
        assert f"nstall {package}" in message
    given = (base, f"data.path=[{records}]", "run.storage=s3://elsewhere/runs")
    assert "s3://elsewhere/runs/r/.lease/00000001.json cannot be written: The specified bucket" in error(
        "adapter-eval", *given
    )
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    s3fs.S3FileSystem.clear_instance_cache()
    assert "s3://elsewhere/runs cannot be reached: Unable to locate credentials" in error("adapter-eval", *given)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def failing_site() -> Iterator[str]:
    """A web server that answers a request for /N with the status N."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(int(self.path.strip("/")))
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_web_server_that_refuses_is_told_from_one_without_the_file(failing_site: str) -> None:
    with pytest.raises(FileNotFoundError, match="/404: there is no such file"):
        cached_path(f"{failing_site}/404")
    for status in (403, 503):
        with pytest.raises(StorageError, match=rf"{failing_site}/{status} cannot be (reached|read): {status}"):
            cached_path(f"{failing_site}/{status}")
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:1/x cannot be (reached|read): Cannot connect to host"):
        cached_path("http://127.0.0.1:1/x")


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # what an earlier test has left may be gone by now
        return ""


@pytest.mark.ray
@pytest.mark.slow
def test_trains_from_and_to_a_bucket_and_goes_on_from_a_checkpoint_there(
    cluster: None, s3: str, tiny_base: Path, records: Path, tmp_path: Path
) -> None:
    """Everything lies on S3; a worker is killed in the middle, and the run's checkpoint is found there."""
    for folder, url in ((tiny_base, f"{s3}/train/base"), (records.parent, f"{s3}/train/data")):
        upload(folder, url)
    given = settings(
        Path("/"), records, tmp_path, "on-s3",
        f"base.path={s3}/train/base", f"data.path=[{s3}/train/data/records.jsonl]", "data.val_fraction=0.1",
        f"run.storage={s3}/runs", "train.epochs=8", "train.checkpoint_every_steps=20",
    )  # fmt: skip
    killed: list[int] = []

    def kill_a_worker() -> None:
        wait_until(lambda: list((given.run.folder / "train").glob("checkpoint_*/position.json")), "a checkpoint")
        family = psutil.Process().children(recursive=True)
        worker = next(child for child in family if "RayTrainWorker" in command(child))
        worker.kill()
        killed.append(worker.pid)

    thread = threading.Thread(target=kill_a_worker, daemon=True)
    thread.start()
    result = adapter_train.run(given)
    thread.join(PATIENCE_S)
    assert killed
    steps = [row["step"] for row in read_jsonl(given.run.folder / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, result["steps"] + 1))
    assert result["val_loss"] < result["base_val_loss"] - 0.02
    left = {path.name for path in given.run.folder.iterdir()}
    assert {"run.json", "config.yaml", "metrics.jsonl", "tensorboard", "report.html", "result.json", "train"} <= left
    assert list((given.run.cache_folder / "tokens").glob("*/index.json"))
    assert not list(tmp_path.iterdir()), "nothing of it is here"
    measured = load(
        adapter_eval.Config,
        {
            "base": {"path": f"{s3}/train/base"},
            "adapter": result["adapter"],
            "data": {"path": [f"{s3}/train/data/records.jsonl"], "max_length": 200},
            "allow_training_records": True,
            "run": {"name": "eval", "storage": f"{s3}/runs"},
        },
    )
    result_of_eval = adapter_eval.run(measured)
    assert (result_of_eval["records"], 0 < result_of_eval["records_trained_on"] < 101) == (101, True)
    assert read_json(f"{s3}/runs/eval/result.json")["loss"] < result["base_val_loss"]
