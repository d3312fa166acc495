"""What answers came from is known by content: moved, it is the same; changed where it lies, it is another."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from adapter import AdaptedModel
from adapter.adaption import AdaptionConfig
from rayjobs.config import load
from rayjobs.inference.adapter_source import AdapterSourceConfig
from rayjobs.inference.result_identity import data_identity, model_identity
from rayjobs.jobs import adapter_generate
from rayjobs.runs.provenance import lock_provenance
from rayjobs.storage.files import read_json
from tests.rayjobs.colour_questions import write_base, write_questions


def adapter(base: Path, file: Path, seed: int) -> str:
    loaded = AdaptedModel.from_pretrained(base)
    loaded.add_adapter(AdaptionConfig(n_layers=2, prompt_length=3), seed=seed)
    loaded.save_adapter(file)
    return str(file)


def source(base: Path, adapter: str | None, **more: str) -> AdapterSourceConfig:
    return load(AdapterSourceConfig, {"base": {"path": str(base), **more}, "adapter": adapter})


def test_answers_are_told_apart_by_what_made_them_and_not_by_where_it_lies(tiny_base: Path, tmp_path: Path) -> None:
    file = adapter(tiny_base, tmp_path / "a.safetensors", seed=0)
    shutil.copytree(tiny_base, tmp_path / "moved")
    write_base(tmp_path / "other")
    one = model_identity(source(tiny_base, file), None)
    moved = shutil.copy(file, tmp_path / "b.safetensors")
    assert model_identity(source(tmp_path / "moved", str(moved)), None) == one
    assert model_identity(source(tiny_base, None), None)["adapter"] == "none"
    for changed, name in [
        (model_identity(source(tmp_path / "other", file), None), "tokenizer"),
        (model_identity(source(tiny_base, file, dtype="bf16"), None), "base"),
        (model_identity(source(tiny_base, adapter(tiny_base, Path(file), seed=1)), None), "adapter"),
    ]:
        assert changed[name] != one[name]

    images = write_questions(tmp_path / "questions", {"test": 3})
    records: list[dict[str, Any]] = [{"instruction": "i", "image": f"images/test/test{i}/image.png"} for i in range(3)]
    asked = data_identity(records, str(images), reads_images=True)
    assert data_identity(records, str(shutil.copytree(images, tmp_path / "copy")), reads_images=True) == asked
    assert data_identity(records[:2], str(images), reads_images=True)["records"] != asked["records"]
    shutil.copy(images / records[0]["image"], images / records[1]["image"])
    assert data_identity(records, str(images), reads_images=True)["images"] != asked["images"]
    (images / records[2]["image"]).unlink()
    assert len({data_identity(records, str(images), reads_images=seen)["images"] for seen in (True, False)}) == 2


def test_a_file_is_gone_on_with_only_by_whoever_began_it(tiny_base: Path, records: Path, tmp_path: Path) -> None:
    """Another adapter in the old one's place is named, and nothing of what is there is touched."""
    file = adapter(tiny_base, tmp_path / "a.safetensors", seed=0)
    run = {"name": "asked", "storage": str(tmp_path)}
    given = {"base": {"path": str(tiny_base)}, "adapter": file, "file": str(records), "run": run}
    identity = tmp_path / "asked" / "parts" / "settings.json"
    lock_provenance(identity, model_identity(source(tiny_base, file), None))
    before = read_json(identity)
    adapter(tiny_base, tmp_path / "a.safetensors", seed=1)
    with pytest.raises(ValueError, match=r"asked/parts holds results .*\(adapter was [0-9a-f]{16}, now "):
        adapter_generate.run(load(adapter_generate.Config, given))
    assert read_json(identity) == before
