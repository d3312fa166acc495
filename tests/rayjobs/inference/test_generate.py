"""adapter-generate: what is typed is answered as it is, and one record that cannot be answered costs one record."""

import io
import json
import os
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adapter import AdaptedModel
from adapter.adaption import AdaptionConfig
from adapter.records.reader import read_records
from adapter.templates import ALPACA
from rayjobs.__main__ import main
from rayjobs.config import load
from rayjobs.inference.batch import BatchGenerator, Chunk
from rayjobs.inference.instruction_file import InstructionRow, read_instructions, write_answers
from rayjobs.inference.instructions import ANSWERS
from rayjobs.jobs import adapter_generate
from rayjobs.storage.files import read_jsonl, write_jsonl
from tests.rayjobs.colour_questions import write_base

LONG = "cat " * 2000


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Records of every kind: with fields of their own, too long, malformed, without an instruction."""
    rows = [
        '{"id": 7, "instruction": "the cat", "output": null, "answer": "gold", "tags": ["a", 1.5, {"b": null}]}',
        json.dumps({"instruction": LONG, "id": 8}),
        '{"instruction": "the dog"',
        '{"instruction": 5, "id": "nine"}',
        '{"instruction": "the mat", "input": null, "image": "a.png", "half": "\\ud83d", "error": 0, "record_error": 1}',
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


def settings(base: Path, tmp_path: Path, *overrides: str) -> adapter_generate.Config:
    given = [f"base.path={base}", f"run.storage={tmp_path / 'runs'}", "run.name=asked", "batch_size=1"]
    return load(adapter_generate.Config, None, [*given, "decoding.max_new_tokens=3", *overrides])


@pytest.mark.ray
def test_records_that_cannot_be_answered_are_set_aside_and_the_others_keep_their_fields(
    cluster: None, tiny_base: Path, file: Path, tmp_path: Path
) -> None:
    config = settings(tiny_base, tmp_path, f"file={file}", "max_rejected_fraction=0.6")
    result = adapter_generate.run(config)
    assert (result["answers"], result["rejected_records"], result["images_left_out"]) == (2, 3, 1)
    assert config.run is not None
    folder = config.run.folder
    rows = read_jsonl(folder / "answers.jsonl")
    assert [row.get("id") for row in rows] == [7, 8, None, "nine", None]
    assert [row["answer"] is None for row in rows] == [False, True, True, True, False]
    first = {"instruction": "the cat", "input": "", "answer": rows[0]["answer"], "error": None}
    own = {"id": 7, "output": None, "record_answer": "gold", "tags": ["a", 1.5, {"b": None}]}
    assert rows[0] == {**first, **own}
    assert list(rows[0])[:4] == ["instruction", "input", "answer", "error"], "in readable order"
    assert rows[4] == {
        **{"instruction": "the mat", "input": "", "image": "a.png", "answer": rows[4]["answer"], "error": None},
        **{"half": "\ud83d", "record_error": 1, "record_record_error": 0},
    }
    rejected = read_jsonl(folder / "rejected.jsonl")
    assert [(row["file"], row["record"]) for row in rejected] == [(str(file), f"line {i}") for i in (2, 3, 4)]
    assert [row["error"] for row in rows if row["error"]] == [row["reason"] for row in rejected]
    for row, reason in zip(rejected, ["base's window of 1024", "malformed JSON", "must be text"], strict=True):
        assert reason in row["reason"]
    assert "the prompt has" in (folder / "report.html").read_text()

    parts = sorted((folder / "parts").glob("*.parquet"))
    whole = [part.read_bytes() for part in parts]
    parts[0].write_bytes(whole[0][:50])
    pq.write_table(pq.read_table(parts[1]).slice(0, 0), parts[1])
    there = settings(tiny_base, tmp_path, f"file={file}", "max_rejected_fraction=0.6", f"out={tmp_path / 'a.parquet'}")
    adapter_generate.run(there)
    assert [part.read_bytes() for part in parts] == whole, "damaged parts are made again"
    table = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["answer"] for row in table] == [row["answer"] for row in rows]
    assert [json.loads(row["record"] or "null") for row in table] == [row.fields for row in read_instructions(file)]


def test_too_many_records_to_set_aside_are_refused_before_anything_is_written(
    tiny_base: Path, file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"3 of 5 records .* over max_rejected_fraction=0\.05: line 2: the prompt has"):
        adapter_generate.run(settings(tiny_base, tmp_path, f"file={file}"))
    assert not (tmp_path / "runs").exists()
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"none\.jsonl: the file is empty"):
        adapter_generate.plan(settings(tiny_base, tmp_path, f"file={tmp_path / 'none.jsonl'}"))
    write_jsonl(tmp_path / "long.jsonl", [{"instruction": LONG}])
    with pytest.raises(ValueError, match=r"no record to answer; line 1: the prompt"):
        adapter_generate.plan(
            settings(tiny_base, tmp_path, f"file={tmp_path / 'long.jsonl'}", "max_rejected_fraction=1")
        )


def test_answers_in_parquet_keep_what_json_has_no_type_for(tmp_path: Path) -> None:
    fields = {"instruction": "the cat", "day": date(2024, 2, 3), "bytes": b"\x00\xff", "half": "\ud83d"}
    row = InstructionRow(location="row 0", fields=fields, record={})
    bad = InstructionRow(location="row 1", fields={"instruction": "\ud83d"}, record={}, error="no text")
    for name in ("a.parquet", "a.jsonl"):
        write_answers(tmp_path / name, [(row, "sat"), (bad, None)])
    (first, second), (line, other) = pq.read_table(tmp_path / "a.parquet").to_pylist(), read_jsonl(tmp_path / "a.jsonl")
    expected = {"instruction": "the cat", "day": "2024-02-03", "bytes": "AP8=", "half": "\ud83d"}
    assert json.loads(first["record"]) == expected
    assert {name: line[name] for name in expected} == expected
    assert (second["instruction"], second["error"], other["instruction"]) == (None, "no text", "\ud83d")


def test_a_damaged_part_counts_as_missing(tmp_path: Path) -> None:
    generator: Any = BatchGenerator.__new__(BatchGenerator)
    object.__setattr__(generator, "schema", ANSWERS)
    part, rows = tmp_path / "0.parquet", pa.Table.from_pylist([{"answer": "a"}, {"answer": None}], ANSWERS)
    pq.write_table(rows, part)
    assert generator._read_part(Chunk(part, "", 2)) == rows
    assert generator._read_part(Chunk(part, "", 3)) is None, "of other records"
    for content in (part.read_bytes()[:-9], b"", b"PAR1"):
        part.write_bytes(content)
        assert generator._read_part(Chunk(part, "", 2)) is None
    pq.write_table(rows.drop_columns(["image"]), part)
    assert generator._read_part(Chunk(part, "", 2)) is None, "of another version"


def test_answers_never_overwrite_what_the_job_reads(tiny_base: Path, tmp_path: Path) -> None:
    file, base = tmp_path / "file.jsonl", write_base(tmp_path / "base")
    write_jsonl(file, [{"instruction": "the cat"}])
    model = AdaptedModel.from_pretrained(base)
    model.add_adapter(AdaptionConfig(n_layers=2, prompt_length=3))
    adapter = tmp_path / "a.safetensors"
    model.save_adapter(adapter)
    (tmp_path / "t.json").write_text(json.dumps({"with_input": ALPACA.with_input, "without_input": "{instruction}"}))
    (tmp_path / "soft.jsonl").symlink_to(file)
    os.link(file, tmp_path / "hard.jsonl")
    os.link(adapter, tmp_path / "adapter.jsonl")
    (tmp_path / "config.jsonl").symlink_to(base / "config.json")
    (tmp_path / "template.parquet").symlink_to(tmp_path / "t.json")
    (tmp_path / "folder.jsonl").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    given = [f"file={file}", f"adapter={adapter}", f"template={tmp_path / 't.json'}"]
    for name in ("file", "soft", "hard", "adapter", "config", "template"):
        out = next(tmp_path.glob(f"{name}.*l*")) if name != "template" else tmp_path / "template.parquet"
        for act in (adapter_generate.plan, adapter_generate.run):
            with pytest.raises(ValueError, match=f"out is .*{out.name}, which would overwrite"):
                act(settings(base, tmp_path, *given, f"out={out}"))
    for out in (tmp_path / "runs" / "asked" / "rejected.jsonl", tmp_path / "folder.jsonl", file / "a.jsonl"):
        with pytest.raises(ValueError, match=r"out is "):
            adapter_generate.plan(settings(base, tmp_path, *given, f"out={out}"))
    with pytest.raises(ValueError, match="out: names the file of the answers to `file`"):
        adapter_generate.plan(settings(base, tmp_path, "instruction=a", f"out={tmp_path / 'x.jsonl'}"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    adapter_generate.plan(settings(base, tmp_path, *given, f"out={tmp_path / 'new' / 'a.jsonl'}"))


def test_answers_never_overwrite_the_settings_of_the_command(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, file = tmp_path / "config.jsonl", tmp_path / "file.jsonl"
    write_jsonl(file, [{"instruction": "the cat"}])
    config.write_text(json.dumps({"base": {"path": str(tiny_base)}, "file": str(file), "run": {"name": "a"}}))
    for words in (["--config", str(config)], [f"--config={config}"]):
        command = ["adapter-generate", *words, f"out={config}", "--dry-run"]
        monkeypatch.setattr(sys, "argv", ["rayjobs", *command])
        assert main(command) == 2
        assert "which would overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["Explain issue #5", "#tag", "~", "a: b", "42", "yes", "null", "two\nlines\n", "'q'"])
def test_an_instruction_is_answered_as_it_is_typed(
    tiny_base: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(adapter_generate.Config, None, [f"base.path={tiny_base}", f"instruction={text}", f"input={text}"])
    assert (config.instruction, config.input) == (text, text)
    adapter_generate.plan(config)
    assert text.split("\n")[0] in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_instruction_is_an_error_and_no_question_to_the_terminal(tiny_base: Path, text: str) -> None:
    config = load(adapter_generate.Config, None, [f"base.path={tiny_base}", f"instruction={text}"])
    with pytest.raises(ValueError, match="instruction is empty: give one, or - to read"):
        adapter_generate.run(config)
    assert load(adapter_generate.Config, {"base": {"path": "b"}, "instruction": None}).instruction == "-"


def test_an_instruction_too_long_for_the_window_is_refused_before_the_model_is_loaded(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_generate, "load_on_gpu", None)
    for words in ([f"instruction={LONG}"], ["instruction=a", f"input={LONG}"]):
        with pytest.raises(ValueError, match=r"instruction: the prompt has .* window of 1024"):
            adapter_generate.run(load(adapter_generate.Config, None, [f"base.path={tiny_base}", *words]))


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_a_session_survives_a_line_that_is_too_long_and_ends_cleanly(
    tiny_base: Path, end: type[BaseException], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lines = iter(["the cat", "", LONG, "half \udcff", "the dog"])

    def typed(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise end
        return line

    monkeypatch.setattr("builtins.input", typed)
    result = adapter_generate.run(
        load(adapter_generate.Config, None, [f"base.path={tiny_base}", "decoding.max_new_tokens=2"])
    )
    assert len(result["answers"]) == 2
    assert [record.message.partition(":")[0] for record in caplog.records] == ["not answered"] * 2
    assert "window of 1024" in caplog.text


def test_lines_that_are_not_utf_8_end_a_session_with_one_message(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(ValueError, match="standard input are not UTF-8"):
        adapter_generate.run(load(adapter_generate.Config, None, [f"base.path={tiny_base}"]))


def test_an_adapter_of_another_base_is_refused_before_a_worker_starts(tiny_base: Path, tmp_path: Path) -> None:
    other, file = write_base(tmp_path / "other"), tmp_path / "a.safetensors"
    model = AdaptedModel.from_pretrained(other)
    model.add_adapter(AdaptionConfig(n_layers=2, prompt_length=3))
    model.save_adapter(file)
    write_jsonl(tmp_path / "file.jsonl", [{"instruction": "the cat"}])
    for words in (["instruction=a"], [f"file={tmp_path / 'file.jsonl'}"]):
        with pytest.raises(ValueError, match=r"a\.safetensors: the adapter was made for another tokenizer"):
            adapter_generate.plan(settings(tiny_base, tmp_path, f"adapter={file}", *words))


def test_the_identity_of_a_file_without_bad_records_is_that_of_before(tmp_path: Path) -> None:
    """A run of the version before resumes: what its answers are recognised by has not changed."""
    path = tmp_path / "file.jsonl"
    write_jsonl(
        path, [{"instruction": "the cat", "id": 1, "output": "o"}, {"instruction": "the dog", "image": "a.png"}]
    )
    assert [row.record for row in read_instructions(path)] == list(read_records(path, answered=False))
