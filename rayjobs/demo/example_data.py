"""Small files for every example of the documents: records, tasks, labelled photos, a tiny base and a tiny CLIP.

They are made from the demo's world, without a network: the base copies notes of three digits, and the records teach it
to write them in words; the photos are drawings of digits, and CLIP has seen printed digits. What exists stays.
"""

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rayjobs.console import Progress
from rayjobs.demo import notes
from rayjobs.demo.config import TinyClipConfig, TinyLlamaConfig
from rayjobs.storage.files import atomic_folder, write_json, write_jsonl, write_parquet, write_text
from rayjobs.storage.paths import make_folder
from rayjobs.storage.yaml_file import write_yaml

RECORDS, HELD_OUT, SEED = 400, 60, 1
PHOTOS, NEW_PHOTOS = 16, 2
"""Photos of each class, to train on and to predict."""


def write_example_data(
    folder: Path, llama: TinyLlamaConfig | None = None, clip: TinyClipConfig | None = None
) -> list[tuple[str, str]]:
    """Write what the examples need into a folder; return (name, meaning) of each part.

    llama, clip: settings of the tiny models; by default those of the demo.
    """
    llama, clip = llama or TinyLlamaConfig(), clip or TinyClipConfig()
    make_folder(folder)
    parts: list[tuple[str, str, Callable[[Path], None]]] = [
        ("records", "instruction records, the same in JSON, JSON lines, CSV, Parquet and as chats", _write_records),
        ("tasks", "tasks of lm-evaluation-harness on the records", lambda new: _write_tasks(new, folder / "records")),
        ("photos", f"{PHOTOS} labelled images of each of ten classes", lambda new: _draw(new, PHOTOS, SEED)),
        ("new_photos", f"{NEW_PHOTOS} other images of each class", lambda new: _draw(new, NEW_PHOTOS, SEED + 1)),
        ("base", "a tiny LLaMA in Hugging Face's format", lambda new: _train_llama(llama, new)),
        ("clip", "a tiny CLIP in open_clip's format", lambda new: _train_clip(clip, new)),
    ]
    for name, _, write in parts:
        if not (folder / name).exists():
            with atomic_folder(folder / name) as new:
                write(new)
    return [(name, meaning) for name, meaning, _ in parts]


def example_records(count: int, *, test: bool) -> list[dict[str, str]]:
    """Instruction records: notes to be written in words."""
    return notes.records(notes.SPELL, count, SEED, test=test)


def _write_records(folder: Path) -> None:
    train, test = example_records(RECORDS, test=False), example_records(HELD_OUT, test=True)
    write_json(folder / "train.json", train)
    write_jsonl(folder / "train.jsonl", train)
    write_text(folder / "train.csv", _csv(train))
    write_parquet(folder / "train.parquet", _table(train))
    write_jsonl(folder / "chats.jsonl", [_chat(record) for record in train])
    write_json(folder / "test.json", test)
    write_json(folder / "copies.json", notes.records(notes.COPY, HELD_OUT, SEED, test=True))
    write_jsonl(folder / "questions.jsonl", [{key: record[key] for key in ("instruction", "input")} for record in test])
    template = {"with_input": notes.TEMPLATE.with_input, "without_input": notes.TEMPLATE.without_input}
    write_json(folder / "template.json", template)


def _write_tasks(folder: Path, records: Path) -> None:
    """Write two tasks: the words of a note are generated, or chosen over the note as it stands."""
    data: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(records / "test.json")}},
        "test_split": "test",
        "doc_to_text": "Instruction: {{instruction}} Input: {{input}} Response:",
    }
    write: dict[str, Any] = {"output_type": "generate_until", "doc_to_target": "{{output}}"}
    write["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": 8}
    write["metric_list"] = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    choose: dict[str, Any] = {"output_type": "multiple_choice", "doc_to_target": 0}
    choose["doc_to_choice"] = ["{{output}}", "{{input}}"]
    choose["metric_list"] = [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
    ]
    for name, task in (("notes_write", write), ("notes_choose", choose)):
        write_yaml(folder / f"{name}.yaml", {"task": name, "tag": "notes", **data, **task})


def _csv(records: list[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _table(records: list[dict[str, str]]) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist(records)


def _chat(record: dict[str, str]) -> dict[str, Any]:
    question = {"role": "user", "content": f"{record['instruction']} {record['input']}"}
    return {"messages": [question, {"role": "assistant", "content": record["output"]}]}


def _draw(folder: Path, count: int, seed: int) -> None:
    from rayjobs.demo.stroke_digits import write_drawings

    write_drawings(folder, count, seed)


def _train_llama(settings: TinyLlamaConfig, folder: Path) -> None:
    from rayjobs.demo.llama import train_llama

    _train("tiny LLaMA", train_llama(settings, folder, "cpu"), settings.steps)


def _train_clip(settings: TinyClipConfig, folder: Path) -> None:
    from rayjobs.demo.clip import train_clip

    _train("tiny CLIP", train_clip(settings, folder, "cpu"), settings.steps)


def _train(title: str, losses: Iterator[float], steps: int) -> None:
    from rayjobs.demo.cache_dir import torch_threads

    with torch_threads(1), Progress(title, unit="steps", total=steps) as bar:
        for step, loss in enumerate(losses, 1):
            bar.update(step, f"loss {loss:.2f}")
