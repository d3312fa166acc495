"""Every question meets its own image: an adapter that answers by the image alone follows it wherever it is dealt."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from adapter.records.scienceqa import LETTERS
from rayjobs.config import load
from rayjobs.jobs import adapter_eval
from rayjobs.models.image_conditioning import VisionConfig
from tests.rayjobs.cafo_dataset import make_encoders
from tests.rayjobs.colour_questions import shuffle, train_adapter, write_base, write_questions

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colours")
    write_base(folder / "base")
    write_questions(folder / "questions", {"train": 40, "test": 60})
    vision = load(VisionConfig, {"encoder": make_encoders(folder / "encoders")["clip"], "bottleneck": 7})
    train_adapter(folder / "base", vision, folder / "questions", folder / "adapter.safetensors")
    return folder


def answered(world: Path, name: str, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    clip = {"kind": "clip", "weights": str(world / "encoders" / "clip")}
    given = {
        "base": {"path": str(world / "base")},
        "adapter": str(world / "adapter.safetensors"),
        "vision": {"encoder": clip},
        "task": "scienceqa",
        "reading": "likelihood",
        "data": {"path": [str(world / "questions")]},
        "batch_size": 7,
        "run": {"name": name, "storage": str(world / "runs")},
    }
    built = load(adapter_eval.Config, {**given, **changes})
    result = adapter_eval.run(built)
    return result, pq.read_table(built.run.folder / "predictions.parquet").to_pylist()


def test_answers_follow_the_images_and_are_the_same_on_two_workers(cluster: None, world: Path) -> None:
    result, alone = answered(world, "one")
    assert float(result["accuracy_by_class"][1]["IMG"].split()[0]) == 100
    _, shared = answered(world, "two", scale={"workers": 2})
    assert shared == alone
    shown = shuffle(world / "questions", world / "shuffled")
    result, dealt = answered(world, "dealt", data={"path": [str(world / "shuffled")]}, scale={"workers": 2})
    assert {row["pid"]: LETTERS.index(row["predicted"]) for row in dealt if row["pid"] in shown} == shown
    assert 25 < float(result["accuracy_by_class"][1]["IMG"].split()[0]) < 75, "chance"
    assert [row for row in dealt if row["pid"] not in shown] == [row for row in alone if row["pid"] not in shown]
