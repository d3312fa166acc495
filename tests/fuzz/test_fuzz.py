"""The first inputs of `make fuzz`, changes that hypothesis draws, and each fault that the large run has found."""

import json
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from adapter.records.reader import checked_rows
from tests.fuzz import adapter_targets
from tests.fuzz.__main__ import find_targets
from tests.fuzz.guard import Misbehaviour, watched
from tests.fuzz.mutation import Harmful
from tests.fuzz.target import Bench

TARGETS = find_targets()
INPUTS = 8
"""Inputs of each target; the run of `make fuzz` begins with the same."""
SETTINGS = settings(
    max_examples=4, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bench]:
    """A folder for each target, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("fuzz")

    class Benches(dict[str, Bench]):
        def __missing__(self, name: str) -> Bench:
            return self.setdefault(name, Bench(TARGETS[name], folder / name))

    return Benches()


@pytest.mark.filterwarnings("ignore")  # of libraries, over what is damaged
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if target.quick else pytest.mark.slow) for name, target in TARGETS.items()]
)
def test_damaged_files_are_read_or_refused(name: str, benches: dict[str, Bench]) -> None:
    bench = benches[name]
    for number in range(INPUTS):
        bench.damage(random.Random(f"{name} 0 {number}"))
        bench.try_read()

    @SETTINGS
    @given(st.randoms(use_true_random=False))
    def try_drawn(rng: random.Random) -> None:
        bench.damage(rng)
        bench.try_read()

    try_drawn()
    bench.restore()


def gguf_of(folder: Path, values: list[str]) -> bytes:
    """A file of llama.cpp's format whose architecture is a list."""
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    del writer.kv_data[0]["general.architecture"]
    writer.add_array("general.architecture", values)
    adapter_targets.close(writer)
    return (folder / "model.gguf").read_bytes()


def unaligned(content: bytes) -> bytes:
    """A file of llama.cpp's format one of whose tensors begins a byte later: it has one dimension of 8 values."""
    head = b"output_norm.weight" + struct.pack("<IQI", 1, 8, 0)
    place = content.index(head) + len(head)
    return content[:place] + bytes([content[place] + 1]) + content[place + 1 :]


def arrow_with_offsets(*offsets: int) -> bytes:
    """A stream of one text column whose offsets lead out of its values."""
    places = pa.array(offsets, pa.int32()).buffers()[1]
    texts = pa.Array.from_buffers(pa.string(), len(offsets) - 1, [None, places, pa.py_buffer(b"abc")])
    batch = pa.RecordBatch.from_arrays([texts, texts], ["instruction", "output"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue().to_pybytes()


def without_footer(content: bytes) -> bytes:
    """A Parquet file whose description of itself is overwritten."""
    size = int.from_bytes(content[-8:-4], "little")
    return content[: -8 - size] + b"\xff" * size + content[-8:]


def with_header(content: bytes, key: str, value: str) -> bytes:
    """A safetensors file with another text in its metadata."""
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    return save(load(content), {**metadata, key: value})


DEEP = b'{"a":' * 100_000
MERGES = "\n".join(["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{f'*a{i - 1},' * 9}]}}" for i in range(1, 12))]).encode()
"""Lines that each copy the line before them nine times."""
FOUND: dict[str, list[tuple[str, str, bytes | Callable[[bytes], bytes]]]] = {
    "JSON that is nested too deep": [
        ("checkpoint-hf", "config.json", DEEP),
        ("adapter-peft", "adapter/adapter_config.json", DEEP),
        ("tokenizer-json", "tokenizer.json", DEEP),
        ("scienceqa", "problems.json", b"[" * 100_000),
        ("templates", "template.json", DEEP),
        ("run-folder", "run.json", DEEP),
        ("record-folder", "train/state.json", DEEP),
        ("adapter-own", "adapter.safetensors", lambda old: with_header(old, "extra", DEEP.decode())),
    ],
    "values of another type": [
        ("tokenizer-sentencepiece", "tokenizer_config.json", b'{"added_tokens_decoder": {"3": {}}}'),
        ("tokenizer-json", "tokenizer_config.json", b'{"added_tokens_decoder": {"0": {"special": true}}}'),
        ("tokenizer-tiktoken", "params.json", b"0"),
        ("tokenizer-tiktoken", "tokenizer.model", lambda old: old.replace(b" 7\n", b" \xae\n", 1)),
        ("cache", "cache.safetensors", lambda old: with_header(old, "ensemble", "[0.5]")),
        ("cache", "cache.safetensors", lambda old: with_header(old, "zero_shot_source", "absent")),
        ("rival", "rival.safetensors", lambda old: with_header(old, "constants", "3")),
        ("rival", "rival.safetensors", lambda old: with_header(old, "setting", "{}")),
        ("sweep", "sweep.json", b"[]"),
        ("sweep", "chosen.json", lambda old: old.replace(b'"t0"', b"[1]")),
        ("sweep", "chosen.json", lambda old: old.replace(b'"estimate_correct": 3', b'"estimate_correct": 5')),
        ("sweep", "chosen.json", lambda old: old.replace(b'"estimate_correct": 3', b'"estimate_correct": null')),
        ("run-folder", "files.json", b'{"../outside": "0"}'),
        ("feature-store", "part-00000000.parquet", lambda old: old.replace(b"views", b"viewz")),
        ("token-store", "train-00000000000000.parquet", lambda old: old.replace(b"spans", b"spanz")),
        ("token-store", "index.json", b'{"parts": {"train": [[1]]}, "rejected": 0}'),
        ("record-card", "README.md", lambda old: old.replace(b"data/*", b"data**")),
        ("config-overrides", "overrides.txt", b"data.path=[{[{}]: b}]"),
    ],
    "places that lead out of the values": [
        ("checkpoint-gguf", "model.gguf", unaligned),
    ],
    "a damaged container": [
        ("encoder-weights", "dino.pth", lambda old: old.replace(b"PK\1\2", b"PK\1\3")),
        ("image-collection", "images.parquet", without_footer),
        ("image-collection", "images.parquet", lambda old: old.replace(b"label", b"l\xffbel")),
        ("sweep", "images.parquet", lambda old: old.replace(b"a.png", b"\xd5.png")),
    ],
    "YAML that holds itself, or grows": [
        ("config-yaml", "cafo.yaml", b"data: &a [*a]"),
        ("config-yaml", "cafo.yaml", b"data: !!timestamp [1]"),
        ("config-yaml", "cafo.yaml", MERGES),
    ],
}


@pytest.mark.parametrize("kind", FOUND)
def test_what_the_large_run_found_is_refused(kind: str, benches: dict[str, Bench]) -> None:
    for name, file, change in FOUND[kind]:
        bench = benches[name]
        content = change if isinstance(change, bytes) else change(bench.files[file])
        assert content != bench.files[file]
        bench.put(file, content)
        assert not bench.try_read(), (name, file)
        bench.restore()


def test_metadata_of_another_type_is_refused(benches: dict[str, Bench], tmp_path: Path) -> None:
    bench = benches["checkpoint-gguf"]
    bench.put("model.gguf", gguf_of(tmp_path, ["llama"]))
    assert not bench.try_read()
    bench.restore()


def test_texts_that_lead_out_of_an_arrow_file_cost_their_row_alone(tmp_path: Path) -> None:
    """They crashed the process, or read whatever lay beyond the file in memory."""
    path = tmp_path / "records.arrow"
    path.write_bytes(arrow_with_offsets(0, 1, 1 << 30, 3))
    errors = [error for _, _, error in checked_rows(path)]
    assert errors[0] == ""
    assert all("a value is damaged" in error for error in errors[1:])


def test_a_link_to_itself_and_a_name_of_no_file_are_messages(benches: dict[str, Bench]) -> None:
    bench = benches["run-folder"]
    bench.changed = "config.yaml"
    path = bench.folder / bench.changed
    path.unlink()
    path.symlink_to(path.name)
    bench.try_read()
    bench.put("files.json", b'{"a\\u0000b": "0"}')  # a name that no file can have
    bench.try_read()
    bench.restore()


def test_the_guard_sees_what_a_reader_must_not_do(tmp_path: Path) -> None:
    """Not a property of the readers, but of their test."""
    inside = tmp_path / "inside"
    inside.mkdir()

    def write(path: Path) -> None:
        with watched(inside):
            path.write_text("x")

    write(inside / "a")
    for act in (
        lambda: write(tmp_path / "outside"),
        lambda: _inside(inside, lambda: pickle.loads(pickle.dumps(Harmful()))),
        lambda: _inside(inside, lambda: [][0]),
    ):
        with pytest.raises(Misbehaviour):
            act()


def _inside(folder: Path, act: Callable[[], object]) -> None:
    with watched(folder):
        act()
