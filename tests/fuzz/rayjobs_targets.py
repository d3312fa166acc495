"""The readers of `rayjobs/`: settings, run folders, stores, journals, sets of records and images, requests."""

import asyncio
import base64
import importlib
import json
import tarfile
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from adapter.base.checkpoint import save_decoder
from adapter.model import AdaptedModel
from adapter.tokenizers.load import load_tokenizer
from rayjobs.config import load, to_dict
from rayjobs.data import feature_part, token_part
from rayjobs.data.image_collection import ImageCollectionConfig
from rayjobs.data.record_files import find_files
from rayjobs.data.token_store import TokenStore
from rayjobs.data.trained_records import read_digests, write_digests
from rayjobs.errors import UserError
from rayjobs.inference.class_descriptions import read_descriptions
from rayjobs.inference.instruction_file import read_instructions, write_answers
from rayjobs.reporting.comparison import compare
from rayjobs.reporting.report import read_page, run_rows
from rayjobs.runs import file_digests
from rayjobs.runs.record import find_runs, headline, read_record
from rayjobs.storage.counted_reader import CountedReader
from rayjobs.storage.files import write_json, write_jsonl, write_parquet
from rayjobs.storage.lease_files import Holder, LeaseFiles
from rayjobs.storage.yaml_file import dump_yaml
from rayjobs.train.checkpoint import TrainingCheckpoint, list_checkpoints, newest_readable, write_checkpoint
from rayjobs.tune.images import SweepImage, read_images, write_images
from rayjobs.tune.search_space import Setting
from rayjobs.tune.selection import ChosenSetting, ChosenTrial, read_chosen
from tests.fuzz import adapter_targets, cafo_targets
from tests.fuzz.target import Target

CONFIGS = {
    "adapter-train": "adapter/smollm2",
    "cafo": "cafo/digits",
    "adapter-tune": "adapter/search",
    "cafo-prompt": "cafo/prompt_llama",
}
SHIPPED = Path(importlib.import_module("rayjobs").__file__ or "").parent / "configs"


def config_class(job: str) -> Any:
    return importlib.import_module(f"rayjobs.job_configs.{job.replace('-', '_')}").Config


def write_configs(folder: Path) -> None:
    for job, name in CONFIGS.items():
        (folder / f"{job}.yaml").write_bytes((SHIPPED / f"{name}.yaml").read_bytes())


def read_configs(folder: Path) -> None:
    refused = None
    for job in CONFIGS:
        try:
            to_dict(load(config_class(job), folder / f"{job}.yaml"))
        except ValueError as error:
            refused = error
    if refused:
        raise refused


OVERRIDES = (
    "data.path=[a.json, {path: b, split: test, weight: 2}]", "optimizer.base_lr=3e-4", "run.name=x", "base.path=m",
    "adapter.method=lora", "scale.workers=2", "data.template=null", "run.track.mlflow=http://a:b@c", "zero.stage=1",
)  # fmt: skip


def write_overrides(folder: Path) -> None:
    (folder / "overrides.txt").write_text("\n".join(OVERRIDES))


def read_overrides(folder: Path) -> None:
    lines = (folder / "overrides.txt").read_bytes().decode("utf-8", "surrogateescape").split("\n")
    load(config_class("adapter-train"), None, lines)


def write_run(folder: Path) -> None:
    record = {"job": "cafo-eval", "state": "done", "started": "2026-01-01T00:00:00+00:00", "seconds": 3.5}
    write_json(folder / "run.json", {**record, "command": "rayjobs cafo", "host": "h", "pid": 3})
    accuracy = {"tip: test accuracy, %": {"CaFo": {"1 shot": "50.0 [40.0, 60.0]"}}}
    result = {"headline": "good", "about": "a run", "rows": [{"a": 1, "b": None}], "steps": 3, "adapter": "x"}
    write_json(folder / "result.json", result)
    (folder / "test").mkdir()
    write_json(folder / "test" / "result.json", {"headline": "h", "tables": {"t": accuracy}, "differences": {}})
    read = [{"worker": 0, "steps": 3, "bytes": 99}]
    metrics = [{"step": i, "loss": 1 / i, "lr": 1e-3, "workers": 1, "data_read": read} for i in range(1, 4)]
    write_jsonl(folder / "metrics.jsonl", metrics)
    (folder / "config.yaml").write_text(dump_yaml({"run": {"storage": "runs", "name": "x"}, "data": {"path": ["a"]}}))
    write_jsonl(folder / "rejected.jsonl", [{"file": "a", "record": "1", "reason": "r"}])
    write_json(folder / "hardware.json", {"cpu": "c", "gpu": "none"})
    file_digests.write_digests(folder)


def read_run(folder: Path) -> None:
    record = read_record(folder)
    if record is not None:
        headline(folder, record.now())
    find_runs(folder.parent)
    run_rows([folder])
    file_digests.changed_files(folder)


def read_report(folder: Path) -> None:
    read_page(folder)
    compare([folder, folder], folder / "comparison.html")


def write_sweep(folder: Path) -> None:
    setting = Setting(1, 2, ("clip", "dino"), "tip", "templates", 1e-3, 5, 1.0, 2.0)
    chosen = ChosenTrial(
        trial="t0", seed=0, accuracy=0.75, alpha=1.0, beta=2.0, ensemble="{}", estimate_correct=3, estimate_images=4
    )
    entry = ChosenSetting(
        shots=1, method="CaFo", group={}, setting=setting, select="val", accuracy=0.75, finished=1, stopped=0,
        seeds=(chosen,),
    )  # fmt: skip
    write_json(folder / "chosen.json", {"chosen": [entry.to_json()]})
    write_json(folder / "sweep.json", {"encoders": {"clip": {"kind": "clip", "name": "RN50", "weights": "random:0"}}})
    (folder / "trials" / "t0").mkdir(parents=True)
    cafo_targets.write_cache(folder / "trials" / "t0")
    write_images(folder, [SweepImage("train", "cat", "a.png", "0")])


def read_sweep(folder: Path) -> None:
    from rayjobs.tune.classifier import open_run

    opened, _ = open_run(folder)
    assert opened.estimate is not None
    for choice in read_chosen(folder):
        choice.estimate()
    read_images(folder)


def write_stores(folder: Path) -> None:
    feature_part.write_part(
        str(folder / "part-00000000.parquet"), [0, 2], np.ones((4, 3), np.float32), 2, [("b.png", "no image")]
    )
    records = [{"id": i, "tokens": [1, 2, 3], "label_spans": [[1, 3]], "image": None} for i in range(3)]
    token_part.write_part(str(folder / "train-00000000000000.parquet"), records)
    index = {"parts": {"train": [["train-00000000000000.parquet", 3]]}, "rejected": 0, "left_out": 0}
    write_json(folder / "index.json", {**index, "changed_turns": {}})
    write_digests(folder / "trained.json", {1, 2, -3})
    write_json(folder / "prompts.json", {"cat": ["a cat"]})
    save_file({"weights": torch.ones(2, 3)}, folder / "classifier.safetensors", {"sentences": "3", "truncated": "0"})


def read_features(folder: Path) -> None:
    reader = CountedReader()
    part = feature_part.read_part(str(folder / "part-00000000.parquet"), reader)
    part.read(reader)
    part.read_rows([0], reader)


def read_tokens(folder: Path) -> None:
    reader, store = CountedReader(), TokenStore.read(folder)
    for parts in filter(None, store.parts.values()):
        token_part.read_records(token_part.read_index(str(folder), [name for name, _ in parts], reader), reader)


def read_small_stores(folder: Path) -> None:
    read_digests(folder / "trained.json")
    read_descriptions(folder / "prompts.json")


def write_checkpoints(folder: Path) -> None:
    for step in (3, 6):
        write_checkpoint(str(folder), TrainingCheckpoint({"a": torch.ones(3)}, step, [{"step": step, "loss": 0.5}]))


def read_checkpoints(folder: Path) -> None:
    newest_readable(list_checkpoints(str(folder)))


def write_leases(folder: Path) -> None:
    files = LeaseFiles(folder)
    for number in (1, 2):
        files.create(number, Holder.here(None))


def read_leases(folder: Path) -> None:
    files = LeaseFiles(folder)
    newest = files.newest()
    if newest is not None and newest.holder is not None:
        newest.holder.is_gone()
        newest.holder.is_seen()
        str(newest.holder)


def write_record_folder(folder: Path) -> None:
    (folder / "train").mkdir()
    rows = [{"instruction": "a", "input": "", "output": "b"}]
    write_parquet(folder / "train" / "data.parquet", pa.Table.from_pylist(rows))
    write_json(folder / "train" / "state.json", {"_data_files": [{"filename": "data.parquet"}]})
    write_json(folder / "train" / "dataset_info.json", {})
    write_json(folder / "dataset_dict.json", {"splits": ["train"]})
    write_jsonl(folder / "questions.jsonl", [{"instruction": "a", "input": "b", "x": [1]}])


def read_record_folder(folder: Path) -> None:
    find_files(str(folder), "train", "train")
    rows = read_instructions(folder / "questions.jsonl")
    write_answers(folder / "answers.jsonl", [(row, None) for row in rows])


def write_declared(folder: Path) -> None:
    configs = [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.jsonl"}]}]
    (folder / "README.md").write_text(f"---\n{dump_yaml({'configs': configs})}---\n# A data set\n")
    (folder / "data").mkdir()
    write_jsonl(folder / "data" / "a.jsonl", [{"instruction": "a", "output": "b"}])


def read_declared(folder: Path) -> None:
    find_files(str(folder), "", "train")


def write_collection(folder: Path) -> None:
    image = cafo_targets.png_bytes()
    rows = [
        {"image": {"bytes": image, "path": "a.png"}, "label": 0},
        {"image": {"bytes": image, "path": "b"}, "label": 1},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "images.parquet")
    (folder / "a.png").write_bytes(image)
    (folder / "list.csv").write_text("path\na.png\n")
    with tarfile.open(folder / "images.tar", "w") as tar:
        tar.add(folder / "a.png", "x/a.png")


def read_collection(folder: Path) -> None:
    from rayjobs.data.image_reading import Unit, _read_row_group, _read_tar

    for name in ("images.parquet", "images.tar", "list.csv"):
        found = load(ImageCollectionConfig, {"path": str(folder / name)}).find()
        for container in found.containers:
            Unit.from_json(Unit(container=container).to_json())
            read = _read_tar if container.file.endswith(".tar") else _read_row_group
            list(read(container, lambda number: False))


BODIES: dict[str, Any] = {
    "/v1/completions": {"model": "base", "prompt": ["the cat", "a"], "max_tokens": 2, "logprobs": 2, "echo": True},
    "/v1/chat/completions": {
        "model": "base", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "max_tokens": 2,
        "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x"], "logprobs": True, "top_logprobs": 2,
    },
    "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": None},
    "/v1/unload_lora_adapter": {"lora_name": "a"},
}  # fmt: skip


def write_bodies(folder: Path) -> None:
    for path, body in BODIES.items():
        (folder / f"{path.rpartition('v1/')[2].replace('/', '-')}.json").write_text(json.dumps(body))


def read_bodies(folder: Path) -> None:
    """Post each body to the application; a status of 500 or more is a fault."""
    app, statuses = application(), []
    for path in BODIES:
        file = folder / f"{path.rpartition('v1/')[2].replace('/', '-')}.json"
        statuses.append(asyncio.run(post(app, path, file.read_bytes())))
    if any(status >= 500 for status in statuses):
        raise AssertionError(f"statuses {statuses}")
    if any(status >= 400 and status != 404 for status in statuses):
        raise UserError(f"statuses {statuses}")


@cache
def application() -> Any:
    """The server's application over a random base of two layers, which goes with this process."""
    from rayjobs.serve.app import create_app
    from rayjobs.serve.settings import EngineConfig
    from rayjobs.serve.text_model import TextModel

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter_targets.train_sentence_piece(folder / "tokenizer.model")
        size = load_tokenizer(folder).vocab_size
        save_decoder(adapter_targets.decoder(replace(adapter_targets.SHAPE, vocab_size=size, max_seq_len=256)), folder)
        model = AdaptedModel.from_pretrained(folder)
    return create_app(TextModel(model, name="base", engine=EngineConfig(slots=4, max_length=256, prepack=False)))


async def post(app: Any, path: str, body: bytes) -> int:
    status = 0

    async def receive() -> dict[str, Any]:
        nonlocal body
        if body is None:
            await asyncio.sleep(60)
        message, body = {"type": "http.request", "body": body or b"", "more_body": False}, None  # type: ignore[assignment]
        return message

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    await app(scope, receive, send)
    return status


def write_uploads(folder: Path) -> None:
    image = cafo_targets.png_bytes()
    text = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    (folder / "body.json").write_text(json.dumps({"model": "m", "image": text, "top": 3, "evidence": 2}))
    head = b"\r\nContent-Disposition: form-data; name="
    parts = [b"", head + b'"model"\r\n\r\nm\r\n', head + b'"image"\r\n\r\n' + image + b"\r\n", b"--\r\n"]
    (folder / "form.bin").write_bytes(b"--xyz".join(parts))
    (folder / "type.txt").write_text('multipart/form-data; boundary="xyz"')


def read_uploads(folder: Path) -> None:
    from rayjobs.serve.image_input import ImageLimits, decode_bytes, decode_text
    from rayjobs.serve.images import read_request

    form_type = (folder / "type.txt").read_bytes().decode("latin-1")
    for kind, name in (("application/json", "body.json"), (form_type, "form.bin")):
        _, image = read_request(kind, (folder / name).read_bytes())
        (decode_text if isinstance(image, str) else decode_bytes)(image, ImageLimits())  # type: ignore[operator]


HARNESS = {
    "task": "mine", "dataset_path": "json", "output_type": "multiple_choice", "doc_to_text": "{{q}}",
    "doc_to_target": 0,
    "doc_to_choice": ["a", "b"], "metric_list": [{"metric": "acc"}],
}  # fmt: skip


def write_harness(folder: Path) -> None:
    (folder / "mine.yaml").write_text(dump_yaml(HARNESS))


def read_harness(folder: Path) -> None:
    from rayjobs.inference.harness_tasks import open_tasks

    open_tasks(["mine"], str(folder))


TARGETS = (
    Target(name="config-yaml", make=write_configs, read=read_configs, share=2),
    Target(name="config-overrides", make=write_overrides, read=read_overrides, share=6),
    Target(name="run-folder", make=write_run, read=read_run, share=4),
    Target(name="run-report", make=write_run, read=read_report, quick=False),
    Target(name="sweep", make=write_sweep, read=read_sweep, share=4),
    Target(name="feature-store", make=write_stores, read=read_features, damaged=("part-*",), share=3),
    Target(name="token-store", make=write_stores, read=read_tokens, damaged=("train-*", "index.json"), share=3),
    Target(
        name="small-stores",
        make=write_stores,
        read=read_small_stores,
        damaged=("trained.json", "prompts.json"),
        share=3,
    ),
    Target(name="train-checkpoints", make=write_checkpoints, read=read_checkpoints, share=3),
    Target(name="leases", make=write_leases, read=read_leases, share=3),
    Target(name="record-folder", make=write_record_folder, read=read_record_folder, damaged=("*.json*",), share=3),
    Target(name="record-card", make=write_declared, read=read_declared, damaged=("README.md",), share=2),
    Target(name="image-collection", make=write_collection, read=read_collection, share=3),
    Target(name="serve-requests", make=write_bodies, read=read_bodies, share=2, quick=False),
    Target(name="serve-images", make=write_uploads, read=read_uploads, share=6),
    Target(name="harness-tasks", make=write_harness, read=read_harness, quick=False),
)
