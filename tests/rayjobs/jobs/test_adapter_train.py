"""adapter-train on a real cluster, against a loop that knows neither Ray nor DeepSpeed."""

import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import torch
from safetensors.torch import load_file

from adapter import AdaptedModel
from adapter.adapter_formats import read_adapter
from adapter.adaption import AdaptionConfig
from adapter.methods.registry import METHODS
from adapter.templates import ALPACA
from cafo.encoders import load_encoder
from cafo.images import Preprocess, load_image
from rayjobs.config import load
from rayjobs.data.loader import collate_micro_batch, load_micro_batches
from rayjobs.data.records import DataConfig, RecordsConfig
from rayjobs.data.sampler import ElasticBatchSampler
from rayjobs.data.token_part import read_records
from rayjobs.data.token_store import prepare_tokens
from rayjobs.errors import ConfigError, DataError
from rayjobs.inference.decoding import DecodingConfig
from rayjobs.job_configs.adapter_train import AdapterConfig
from rayjobs.jobs import adapter_eval, adapter_generate, adapter_train
from rayjobs.runs.record import read_record
from rayjobs.storage.counted_reader import CountedReader
from rayjobs.storage.files import read_json, read_jsonl, read_parquet
from rayjobs.train.trainer import Monitor
from tests.rayjobs.conftest import BAD
from tests.rayjobs.pages import page_text
from tests.waiting import wait_until

pytestmark = pytest.mark.ray


def features(pictured: Path, config: Any, name: str | None) -> torch.Tensor | None:
    """An image's features straight from the encoder."""
    if not name:
        return None
    encoder = load_encoder(config.vision.encoder)
    return torch.cat(encoder.multi_scale(encoder.preprocess(load_image(pictured.parent / name))[None]), dim=1)[0]


def settings(tiny_base: Path, records: Path, storage: Path, name: str, *more: str) -> adapter_train.Config:
    return load(
        adapter_train.Config,
        None,
        [
            f"base.path={tiny_base}",
            f"data.path=[{records}]",
            "data.val_fraction=0.1",
            "data.max_length=200",
            "adapter.n_layers=2",
            "adapter.prompt_length=5",
            "train.epochs=2",
            "train.warmup_epochs=1",
            "train.global_batch=8",
            "train.token_budget=600",
            "optimizer.base_lr=1.0",
            "scale.workers=2",
            f"run.storage={storage}",
            f"run.name={name}",
            *more,
        ],
    )


def plain_loop(config: adapter_train.Config, storage: Path) -> tuple[torch.Tensor, Any, list[float]]:
    """The same training as one plain PyTorch loop over whole global batches."""
    (folder,) = (storage / "cache" / "tokens").iterdir()
    index = json.loads((folder / "index.json").read_text())
    (names,) = json.loads((folder / "images.json").read_text()).values()
    seen = {i: features(Path(config.data.path[0]), config, name) for i, name in enumerate(names) if name not in BAD}
    from rayjobs.data.token_store import TokenStore

    store = TokenStore.read(folder)
    assert index["parts"]["val"]
    order = ElasticBatchSampler(
        store=store,
        split="train",
        global_batch=8,
        token_budget=600,
        shuffle_records=config.train.shuffle_records,
        seed=0,
    )
    base = AdaptedModel.from_pretrained(config.base.path)
    base.add_adapter(config.adapter.build(4, config.vision.open().projection), seed=0)
    trainable = [parameter for parameter in base.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, betas=(0.9, 0.95), weight_decay=0.02)
    per_epoch, losses = order.steps_per_epoch, []
    for epoch in range(2):
        reader = CountedReader()
        records = read_records(order.read_window(epoch, 0, reader), reader)
        for step in range(per_epoch):
            rows = records[step * 8 : step * 8 + 8]
            images = base.model.batch_images([None if row["image"] is None else seen[row["image"]] for row in rows])
            images = images or (torch.zeros(0, 32 + 64 + 128 + 256 + 19), torch.zeros(0, dtype=torch.int64))
            batch = collate_micro_batch({"step": 0, "last": True, "step_labels": 0, "rows": rows, "read": {}})
            labels = sum(end - start for row in rows for start, end in row["label_spans"])
            loss = base.model(batch.tokens, batch.labels, images) / labels
            optimizer.zero_grad()
            loss.backward()
            done = epoch * per_epoch + step
            peak = 1.0 * 8 / 256
            cosine = 0.5 * (1 + math.cos(math.pi * (done - per_epoch) / per_epoch))
            optimizer.param_groups[0]["lr"] = peak * ((done + 1) / per_epoch if epoch == 0 else cosine)
            optimizer.step()
            losses.append(loss.item())
    prompts = torch.stack([adaption.prompt.detach() for adaption in base.model.adaptions])
    return prompts, base.model.vision.state_dict(), losses


@pytest.mark.parametrize("trains", [False, True])
def test_ctrl_c_ends_the_training_in_a_process_that_goes_on(
    trains: bool, cluster: None, tiny_base: Path, pictured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook: its workers are free for the next training."""
    config = settings(tiny_base, pictured, tmp_path, "notebook", "train.epochs=500")
    shown = Monitor.refresh

    def interrupted(monitor: Monitor) -> tuple[int, str]:
        if shown(monitor)[0] or not trains:
            raise KeyboardInterrupt
        return shown(monitor)

    with monkeypatch.context() as patched:
        patched.setattr(Monitor, "refresh", interrupted)
        with pytest.raises(KeyboardInterrupt):
            adapter_train.run(config)
    free = ray.cluster_resources()["CPU"]
    wait_until(lambda: ray.available_resources().get("CPU") == free, "free CPUs")
    record = read_record(config.run.folder)
    assert record
    assert record.state == "interrupted"
    metrics = config.run.folder / "metrics.jsonl"
    assert metrics.exists() == trains
    assert not trains or read_jsonl(metrics)[-1]["epoch"] < 250, "it went on"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(cluster: None, tiny_base: Path, pictured: Path, vision: list[str], storage: Path) -> adapter_train.Config:
    config = settings(tiny_base, pictured, storage, "two_workers", *vision)
    before = _hash(tiny_base)
    adapter_train.run(config)
    assert _hash(tiny_base) == before, "the base's bytes must not change"
    return config


def _hash(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_equals_a_plain_loop(trained: adapter_train.Config, storage: Path) -> None:
    prompts, projection, losses = plain_loop(trained, storage)
    rows = [row for row in read_jsonl(trained.run.folder / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(losses) + 1))
    assert [row["loss"] for row in rows] == pytest.approx(losses, abs=1e-5)
    file = read_adapter(trained.run.folder / "adapter.safetensors")
    torch.testing.assert_close(file.prompt, prompts, rtol=0, atol=1e-4)
    torch.testing.assert_close(file.projection, projection, rtol=0, atol=1e-4)


def test_learns_and_leaves_all_that_a_run_should(trained: adapter_train.Config) -> None:
    folder = trained.run.folder
    result = json.loads((folder / "result.json").read_text())
    assert result["val_loss"] < result["base_val_loss"] - 0.02
    trainable = 2 * (5 * 24 + 6) + 7 * (32 + 64 + 128 + 256 + 19 + 1) + 24 * (7 + 1)
    assert result["trainable_parameters"] == trainable
    assert result["train_records"] + result["val_records"] == 101
    assert result["rejected_records"] == 3
    read, steps = result["data_read"], result["steps"]
    assert [(row["worker"], row["steps"]) for row in read] == [(0, steps), (1, steps)]
    assert sum(row["records"] for row in read) == 2 * result["train_records"]
    assert sum(row["images"] for row in read) == 2 * result["train_records_with_image"]
    assert "data read" in page_text(folder)
    (tokens,) = (trained.run.cache_folder / "tokens").iterdir()
    reasons = {row["image"]: row["reason"] for row in read_jsonl(tokens / "rejected.jsonl")}
    assert set(reasons) == set(BAD)
    assert all(name in reason for name, reason in reasons.items())
    report = page_text(folder)
    assert all(" ".join(reason.split()) in report for reason in reasons.values())
    assert 40 < result["train_records_with_image"] <= 50
    assert {"config.yaml", "versions.json", "metrics.jsonl", "tensorboard"} <= {path.name for path in folder.iterdir()}
    (checkpoint,) = (path for path in (folder / "train").glob("checkpoint_*") if path.is_dir())
    state = load_file(checkpoint / "state.safetensors")
    assert sum(tensor.numel() for tensor in state.values()) == 3 * trainable + 1, "never base or encoder"


def test_all_files_of_a_run_follow_the_umask(trained: adapter_train.Config, storage: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    modes = {path: path.stat().st_mode & 0o777 for path in storage.rglob("*") if path.is_file()}
    assert {path.suffix for path in modes} >= {".safetensors", ".parquet", ".json", ".jsonl", ".yaml", ".html"}
    assert {path: mode for path, mode in modes.items() if mode != 0o666 & ~umask} == {}


def test_a_finished_run_is_shown_again_and_other_settings_are_refused(
    trained: adapter_train.Config, tiny_base: Path, pictured: Path, vision: list[str], storage: Path
) -> None:
    modified = (trained.run.folder / "adapter.safetensors").stat().st_mtime_ns
    adapter_train.run(trained)
    assert (trained.run.folder / "adapter.safetensors").stat().st_mtime_ns == modified
    with pytest.raises(ValueError, match=r"other settings \(train\.epochs was 2\.0, now 3\.0\)"):
        adapter_train.run(settings(tiny_base, pictured, storage, "two_workers", *vision, "train.epochs=3"))


@pytest.mark.parametrize(
    "more",
    [("scale.workers=1", "zero.stage=0", "vision.mode=streamed"), ("zero.stage=3",)],
    ids=["one-worker-that-holds-the-encoder", "zero-3"],
)
def test_any_number_of_workers_any_stage_and_either_way_of_images_train_the_same_adapter(
    trained: adapter_train.Config,
    tiny_base: Path,
    pictured: Path,
    vision: list[str],
    storage: Path,
    more: tuple[str, ...],
) -> None:
    other = settings(tiny_base, pictured, storage, "-".join(more).replace("=", ""), *vision, *more)
    adapter_train.run(other)
    steps = [
        [row["loss"] for row in read_jsonl(config.run.folder / "metrics.jsonl") if "loss" in row]
        for config in (trained, other)
    ]
    assert steps[1] == pytest.approx(steps[0], abs=1e-5)
    ours, theirs = (read_adapter(config.run.folder / "adapter.safetensors") for config in (trained, other))
    torch.testing.assert_close(theirs.prompt, ours.prompt, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.gate, ours.gate, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.projection, ours.projection, rtol=0, atol=1e-5)


def test_eval_agrees_with_training_and_with_the_model(
    trained: adapter_train.Config, tiny_base: Path, pictured: Path, vision: list[str]
) -> None:
    config = load(
        adapter_eval.Config,
        None,
        [
            f"base.path={tiny_base}",
            f"adapter={trained.run.folder / 'adapter.safetensors'}",
            "allow_training_records=true",
            *vision,
            f"data.path=[{pictured}]",
            "data.max_length=200",
            f"run.storage={trained.run.storage}",
            "run.name=eval",
        ],
    )
    result = adapter_eval.run(config)
    assert (result["records"], 0 < result["records_trained_on"] < 101) == (101, True)
    held_out = replace(config, data=None, split="val", run=replace(config.run, name="eval-val"))
    learned = read_json(trained.run.folder / "result.json")
    assert adapter_eval.run(held_out)["loss"] == pytest.approx(learned["val_loss"], abs=1e-4)
    base = AdaptedModel.from_pretrained(tiny_base)
    base.load_adapter(trained.run.folder / "adapter.safetensors")
    total = labels = 0.0
    from adapter.records.encoding import encode_record
    from adapter.records.reader import read_records

    for record in read_records(pictured):
        if record["image"] in BAD:
            continue
        example = encode_record(record, base.tokenizer, max_length=200)
        images = base.model.batch_images([features(pictured, trained, record["image"])])
        log_p = base.model(torch.tensor([example.ids]), images=images)[0].log_softmax(-1)
        for place in range(*example.label_spans[0]):
            total -= log_p[place - 1, example.ids[place]].item()
            labels += 1
    assert result["labelled_tokens"] == labels
    report = page_text(config.run.folder)
    assert all(" ".join(row["reason"].split()) in report for row in read_jsonl(trained.run.folder / "rejected.jsonl"))
    assert result["loss"] == pytest.approx(total / labels, abs=1e-4)


def test_generate_answers_a_file_as_the_library_does(
    trained: adapter_train.Config, tiny_base: Path, pictured: Path, vision: list[str], tmp_path: Path
) -> None:
    config = load(
        adapter_generate.Config,
        None,
        [
            f"base.path={tiny_base}",
            f"adapter={trained.run.folder / 'adapter.safetensors'}",
            *vision,
            f"file={pictured}",
            f"run.storage={tmp_path}",
            "run.name=answers",
            "decoding.max_new_tokens=7",
            "decoding.temperature=0",
            "batch_size=40",
        ],
    )
    assert adapter_generate.run(config)["answers"] == 104 - len(BAD)
    folder = tmp_path / "answers"
    rows = read_jsonl(folder / "answers.jsonl")
    base = AdaptedModel.from_pretrained(tiny_base)
    base.load_adapter(trained.run.folder / "adapter.safetensors")
    prompts = [ALPACA.render(row["instruction"], row["input"]) for row in rows[:9]]
    images = [features(pictured, trained, row.get("image")) for row in rows[:9]]
    expected = base.generate(prompts, images=images, max_new_tokens=7, temperature=0)
    assert [row["answer"] for row in rows[:9]] == [text.strip() for text in expected]
    assert [row["image"] for row in rows if row["error"]] == list(BAD)
    assert [row["image"] for row in rows if row["answer"] is None] == list(BAD)

    assert (folder / "report.html").read_text().count("<img") == 12
    report = page_text(folder)
    assert all(" ".join(row["error"].split()) in report for row in rows if row["error"])
    assert all(row["instruction"] in report for row in rows[::8][:12])
    assert read_record(folder).state == "done"
    parts = {path: path.stat().st_mtime_ns for path in (folder / "parts").iterdir() if path.suffix == ".parquet"}
    there = replace(config, out=str(tmp_path / "there.parquet"))
    adapter_generate.run(there)
    table = pq.read_table(tmp_path / "there.parquet").to_pylist()
    assert [row["answer"] for row in table] == [row["answer"] for row in rows]
    assert [json.loads(row["record"]) for row in table] == read_jsonl(pictured), "every field of every record"
    assert [row["output"] for row in rows] == [row["output"] for row in read_jsonl(pictured)]
    assert {path: path.stat().st_mtime_ns for path in parts} == parts, "nothing is answered twice"
    with pytest.raises(ValueError, match=r"parts holds results of other settings \(decoding\.max_new_tokens was"):
        adapter_generate.run(replace(config, decoding=DecodingConfig(max_new_tokens=8)))
    assert read_record(folder).state == "done", "what is refused leaves no trace"
    with pytest.raises(ValueError, match=r"run\.name: required"):
        adapter_generate.run(replace(config, run=None))


def test_the_stream_deals_every_record_once(cluster: None, tiny_base: Path, records: Path, tmp_path: Path) -> None:
    data = DataConfig(path=[str(records)], val_fraction=0.1)
    store = prepare_tokens(data, tiny_base / "tokenizer.model", tmp_path)
    order = ElasticBatchSampler(
        store=store, split="train", global_batch=8, token_budget=600, shuffle_records=30, seed=1
    )
    steps = range(3, 2 * order.steps_per_epoch)
    dealt = [list(load_micro_batches(order, rank, 2, steps)) for rank in range(2)]
    assert [[(micro.step, micro.last) for micro in part] for part in dealt[:1]] == [
        [(micro.step, micro.last) for micro in part] for part in dealt[1:]
    ]
    second = Counter(id for part in dealt for micro in part if micro.step >= order.steps_per_epoch for id in micro.ids)
    assert set(second.values()) == {1}
    assert len(second) == store.rows("train")
    assert store.rows("train") + store.rows("val") == 101


def test_tokens_are_prepared_once_and_held_out_by_content(
    cluster: None, tiny_base: Path, records: Path, tmp_path: Path
) -> None:
    config, tokenizer = DataConfig(path=[str(records)], val_fraction=0.3), tiny_base / "tokenizer.model"
    first = prepare_tokens(config, tokenizer, tmp_path)
    (index,) = tmp_path.glob("tokens/*/index.json")
    made = index.stat().st_mtime_ns
    assert prepare_tokens(config, tokenizer, tmp_path) == first
    assert index.stat().st_mtime_ns == made
    shuffled = tmp_path / "shuffled.jsonl"
    lines = records.read_text().splitlines()
    shuffled.write_text("\n".join([*lines[::-1], lines[0]]) + "\n")
    other = prepare_tokens(DataConfig(path=[str(shuffled)], val_fraction=0.3), tokenizer, tmp_path)
    assert abs(other.rows("val") - first.rows("val")) <= 1, "by content, not by place"


def test_formats_mix_in_one_store_with_their_images(
    cluster: None, tiny_base: Path, pictured: Path, scienceqa: Path, tmp_path: Path
) -> None:
    talk = [{"from": "human", "value": "<image> the cat"}, {"from": "gpt", "value": "sat"}]
    talks = [{"image": "plain.png", "conversations": talk * 2}, {"id": "odd", "conversations": talk[::-1]}]
    (tmp_path / "talk.json").write_text(json.dumps(talks))
    data = load(
        RecordsConfig,
        {
            "path": [
                {"path": str(scienceqa), "format": "scienceqa", "split": "test"},
                {"path": str(tmp_path / "talk.json"), "format": "llava", "images": str(pictured.parent)},
                {"path": str(pictured)},
            ],
            "max_length": 1024,
            "max_rejected_fraction": 1,
        },
    )
    store = prepare_tokens(data, tiny_base / "tokenizer.model", tmp_path, preprocess=Preprocess(size=32, resize=32))
    rejected = read_jsonl(Path(store.folder) / "rejected.jsonl")
    told = [row for row in rejected if "leaves no label" in row["reason"]]  # 97 pieces spell long problems badly
    assert [row["id"] % 2**40 for row in rejected if row["record"] == "item 2, id 'odd'"] == [1]
    assert len(rejected) == len(told) + len(BAD) + 1
    assert store.rows("train") == 60 + 1 + 101 - len(told)
    assert store.images("train") == 24 + 1 + 50 - sum(bool(row["image"]) for row in told)
    blind = prepare_tokens(data, tiny_base / "tokenizer.model", tmp_path)
    assert (blind.images("train"), blind.rejected) == (0, len(told) + 1)
    assert (store.images_left_out, blind.images_left_out) == (0, 24 + 1 + 50 + len(BAD))


def test_what_is_asked_about_one_image_is_held_out_together(cluster: None, tiny_base: Path, tmp_path: Path) -> None:
    def talk(name: str) -> list[dict[str, str]]:
        turns = [{"from": "human", "value": f"the cat {name} {i}"} for i in range(4)]
        return [turn for asked in turns for turn in (asked, {"from": "gpt", "value": "sat"})]

    talks = [{"image": f"{i % 20}.png", "conversations": talk(str(i))} for i in range(40)]
    talks += [{"conversations": talk(f"text {i}")} for i in range(20)]
    (tmp_path / "talk.json").write_text(json.dumps(talks))
    data = DataConfig(path=[str(tmp_path / "talk.json")], format="llava", val_fraction=0.4)
    store = prepare_tokens(data, tiny_base / "tokenizer.model", tmp_path)
    sides: dict[str, set[str]] = {}
    for split in ("train", "val"):
        for name, _ in store.parts[split]:
            for id in read_parquet(f"{store.folder}/{name}")["id"].to_pylist():
                about = talks[id].get("image") or f"text {id}"
                sides.setdefault(about, set()).add(split)
    assert len(sides) == 40
    assert all(len(found) == 1 for found in sides.values())
    assert set.union(*sides.values()) == {"train", "val"}


def test_records_without_a_label_are_set_aside_with_their_reason(
    cluster: None, tiny_base: Path, tmp_path: Path
) -> None:
    rows = [{"instruction": "cat " * (300 if i == 4 else 1), "output": "dog"} for i in range(30)]
    path = tmp_path / "r.json"
    path.write_text(json.dumps(rows))
    tokenizer = tiny_base / "tokenizer.model"
    store = prepare_tokens(RecordsConfig(path=[str(path)], max_length=250), tokenizer, tmp_path)
    assert (store.rows("train"), store.rejected) == (29, 1)
    (rejected,) = read_jsonl(Path(store.folder) / "rejected.jsonl")
    assert (rejected["id"], rejected["file"], rejected["record"]) == (4, str(path), "record 5")
    assert "leaves no label within 250" in rejected["reason"]
    with pytest.raises(ValueError, match=r"1 of 30 records cannot be used.*leaves no label"):
        prepare_tokens(
            RecordsConfig(path=[str(path)], max_length=250, max_rejected_fraction=0.01),
            tokenizer,
            tmp_path / "b",
            run=tmp_path,
        )
    assert read_jsonl(tmp_path / "rejected.jsonl") == [rejected], "where it matters most"


def test_bad_records_far_down_are_set_aside_one_by_one(cluster: None, tiny_base: Path, tmp_path: Path) -> None:
    good, half = {"instruction": "cat", "output": "dog"}, {"instruction": "cat \ud83d", "output": "dog"}
    lines = [*[json.dumps(good)] * 1500, '{"instruction": "cat"}', json.dumps(half), '{"instruction": "c']
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    (tmp_path / "r.json").write_text(f"[{', '.join([*lines[:3], *lines[-3:-1], lines[0]])}]")
    paths, tokenizer = [str(tmp_path / "r.jsonl"), str(tmp_path / "r.json")], tiny_base / "tokenizer.model"
    store = prepare_tokens(RecordsConfig(path=paths), tokenizer, tmp_path)
    assert (store.rows("train"), store.rejected) == (1504, 5)
    rejected = read_jsonl(Path(store.folder) / "rejected.jsonl")
    assert [(row["file"], row["record"]) for row in rejected] == [
        *((paths[0], f"line {number}") for number in (1501, 1502, 1503)),
        *((paths[1], f"item {number}") for number in (4, 5)),
    ]
    reasons = ["the record has no 'output'", "half of a surrogate pair", "malformed JSON: Unterminated string"]
    assert all(reason in row["reason"] for reason, row in zip([*reasons, *reasons[:2]], rejected, strict=True))
    with pytest.raises(
        DataError, match=r"5 of 1509 records cannot be used, over data\.max_rejected_fraction=0\.001: .*1501"
    ):
        prepare_tokens(RecordsConfig(path=paths, max_rejected_fraction=0.001), tokenizer, tmp_path)  # the same store


def test_a_cut_file_is_told_as_it_is_by_a_worker(cluster: None, tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("[" + '{"instruction": "cat", "output": "dog"},\n' * 1500 + '{"instruction": "cat"')
    with pytest.raises(ValueError, match=r"r\.json, item 1501: malformed JSON: the file ends within it") as error:
        prepare_tokens(RecordsConfig(path=[str(path)]), tiny_base / "tokenizer.model", tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_records_of_which_none_can_be_used(cluster: None, tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps([{"question": "cat", "answer": "dog"}] * 3))
    with pytest.raises(DataError, match=r"none of 3 records can be used.*item 1: the columns say no format"):
        prepare_tokens(
            RecordsConfig(path=[str(path)], max_rejected_fraction=1), tiny_base / "tokenizer.model", tmp_path
        )


def test_sequences_longer_than_the_window_are_refused(tiny_base: Path, records: Path, tmp_path: Path) -> None:
    adapter_train.check(settings(tiny_base, records, tmp_path, "r", "data.max_length=1024"))
    with pytest.raises(
        ConfigError, match=r"data\.max_length is 1025, more than the window of .*, 1024 tokens: lower it"
    ):
        adapter_train.check(settings(tiny_base, records, tmp_path, "r", "data.max_length=1025"))


def test_adapters_that_settings_name() -> None:
    assert AdapterConfig(n_layers=2, prompt_length=5).build(9, None) == AdaptionConfig(n_layers=2, prompt_length=5)
    assert [AdapterConfig().build(layers, None).n_layers for layers in (9, 32)] == [9, 30]
    for name, made in METHODS.items():
        method = AdapterConfig(method=name).build(32, None)
        assert (type(method), method.method) == (made, name)
        assert method.n_layers == (30 if name in ("zero_init", "rand_init", "prefix", "v2") else None)
