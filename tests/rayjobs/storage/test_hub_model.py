"""The files that are fetched of a model on the hub, against a server that speaks its API over a socket."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from rayjobs.config import config, iter_paths, load, replace_paths, to_dict
from rayjobs.errors import ConfigError, StorageError
from rayjobs.storage.download import cached_path
from rayjobs.storage.hub import pin
from rayjobs.storage.hub_model import bytes_to_fetch, format_bytes
from rayjobs.storage.paths import ModelPath, check_reachable
from tests.hub_server import Hub, serve_hub, use_hub

SMALL = {"config.json": b"{}", "tokenizer.json": b"[]", "chat_template.jinja": b"{{ messages }}"}
UNREAD = {
    "README.md": b"-",
    "model.fp16.safetensors": b"1" * 99,
    "consolidated.safetensors": b"2" * 99,
    "tf_model.h5": b"3",
    "onnx/model.onnx": b"4",
    "original/consolidated.00.pth": b"5",
    "original/params.json": b"{}",
    "training_args.bin": b"6",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub() as hub:
        use_hub(hub.url, str(tmp_path / "home"), monkeypatch)
        monkeypatch.chdir(tmp_path)
        yield hub


SHARDS = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 2000 for i in (1, 2)}
BINARY = {"pytorch_model.bin": b"7" * 3000}


@pytest.mark.parametrize(
    ("weights", "others"),
    [
        ({"model.safetensors": b"0" * 5000}, BINARY),
        ({**SHARDS, "model.safetensors.index.json": b"{1}"}, BINARY),
        (BINARY, {}),
        ({"consolidated.00.pth": b"8", "consolidated.01.pth": b"9", "params.json": b"{2}"}, {}),
    ],
    ids=["safetensors", "shards", "bin", "meta"],
)
def test_one_copy_of_the_weights_is_fetched_and_nothing_that_is_not_read(
    hub: Hub, weights: dict[str, bytes], others: dict[str, bytes]
) -> None:
    sha = hub.add("org/model", {**SMALL, **UNREAD, **weights, **others})
    large = {name: content for name, content in weights.items() if not name.endswith(".json")}
    assert bytes_to_fetch("hf://org/model") == sum(map(len, large.values()))
    assert not hub.fetched()
    cached_path("hf://org/model", weights=False)
    assert sorted(hub.fetched()) == sorted({*SMALL, *weights} - {*large})
    folder = cached_path("hf://org/model")
    assert folder.name == sha
    held = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert held == {**SMALL, **weights}
    assert bytes_to_fetch("hf://org/model") == 0


def test_an_adapters_repository_stands_for_its_file(hub: Hub) -> None:
    hub.add("org/own", {"adapter.safetensors": b"1" * 2000, "config.yaml": b"base: {}", "plot.png": b"2"})
    hub.add("org/peft", {"adapter_model.safetensors": b"3", "adapter_config.json": b"{}"})
    own = cached_path("hf://org/own")
    assert sorted(path.name for path in own.parent.iterdir()) == ["adapter.safetensors", "config.yaml"]
    assert own.read_bytes() == b"1" * 2000
    assert sorted(path.name for path in cached_path("hf://org/peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_gguf_file_is_named(hub: Hub) -> None:
    hub.add("org/quantized", {"config.json": b"{}", "a.q4_0.gguf": b"4" * 3000, "a.q8_0.gguf": b"8"})
    assert bytes_to_fetch("hf://org/quantized/a.q4_0.gguf") == 3000
    assert cached_path("hf://org/quantized/a.q4_0.gguf").read_bytes() == b"4" * 3000
    assert hub.fetched() == ["a.q4_0.gguf"]
    with pytest.raises(StorageError, match=r"of which one must be named: hf://org/quantized@\w+/a.q4_0.gguf"):
        cached_path("hf://org/quantized")
    for name in ("b.gguf", "config.jsonl"):
        with pytest.raises(FileNotFoundError, match=f"{name}: the repository has no such file"):
            cached_path(f"hf://org/quantized/{name}")


def test_a_repository_without_a_model_says_what_it_holds(hub: Hub) -> None:
    hub.add("org/flax", {"flax_model.msgpack": b"1", "README.md": b"-"})
    with pytest.raises(StorageError, match=r"no model in a known format; its files are README.md, flax_model.msgpack"):
        cached_path("hf://org/flax")


def test_offline_a_complete_copy_serves_and_half_of_one_does_not(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", {**SMALL, "model.safetensors": b"0" * 5000})
    hub.add("org/other", {**SMALL, "model.safetensors": b"0" * 5000})
    folder = cached_path("hf://org/model")
    cached_path("hf://org/other", weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert cached_path("hf://org/model") == folder
    assert bytes_to_fetch("hf://org/model") == 0
    with pytest.raises(StorageError, match="holds no complete copy, and HF_HUB_OFFLINE forbids to ask the hub"):
        cached_path("hf://org/other")
    assert not hub.requests


def test_a_refusal_of_the_hub_is_not_answered_from_the_cache(hub: Hub) -> None:
    sha = hub.add("org/model", {**SMALL, "model.safetensors": b"0" * 5000})
    cached_path(f"hf://org/model@{sha}")
    hub.repos["model", "org/model"].private = True
    with pytest.raises(StorageError, match="has no such model, or it is private"):
        bytes_to_fetch(f"hf://org/model@{sha}")


@config
class Settings:
    """A section with a model."""

    path: ModelPath
    others: tuple[ModelPath, ...] = ()
    name: str = "org/name"


@config
class Outer:
    """A config with a section."""

    base: Settings
    more: dict[str, ModelPath] | None = None


def test_what_is_here_is_a_local_path_and_the_rest_a_hub_id(hub: Hub, tmp_path: Path) -> None:
    def held(text: str) -> str:
        return load(Settings, {"path": text}).path

    assert held("org/name") == "hf://org/name"
    assert held("org/name@v1") == "hf://org/name@v1"
    assert held("hf://org/name/a.gguf") == "hf://org/name/a.gguf"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert held("org/name") == str(tmp_path / "org" / "name")
    assert held("hf://org/name") == "hf://org/name", "unless it is said to be on the hub"
    for text in ("./org/other", "org", "org/other/more", "/org/other", "org/adapter.safetensors", "org/model.gguf"):
        assert held(text) == str((tmp_path / text).resolve())
    assert held("~/base") == str(Path.home() / "base")
    assert held("s3://org/name") == "s3://org/name"
    with pytest.raises(ConfigError, match=r"path: hf://name: a path on the hub is hf://org/name"):
        held("hf://name")


def test_a_config_is_pinned_in_all_its_sections(hub: Hub) -> None:
    sha = hub.add("org/model", SMALL)
    given = {"base": {"path": "org/model", "others": ["org/model@v1", "./here"]}, "more": {"a": "org/model"}}
    settings = load(Outer, given)
    pinned = replace_paths(settings, pin)
    model = f"hf://org/model@{sha}"
    assert list(iter_paths(pinned)) == [model, str(Path("here").resolve())]
    assert to_dict(pinned) == to_dict(settings) | {
        "base": {"path": model, "others": [model, str(Path("here").resolve())], "name": "org/name"},
        "more": {"a": model},
    }
    assert replace_paths(pinned, pin) is pinned
    check_reachable("hf://org/model")
    with pytest.raises(StorageError, match="has no such model"):
        check_reachable("hf://org/nowhere")


def test_sizes_are_in_the_unit_that_suits_them() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 16_060_522_496, 2e15)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "16.1 GB",
        "2,000.0 TB",
    ]
