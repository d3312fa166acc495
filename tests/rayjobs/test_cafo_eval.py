"""cafo-eval and the chain: test opened once, for the choice that val made; tables that the run folder proves."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cafo import published
from rayjobs.accuracy import published_rows, summary, table
from rayjobs.config import load
from rayjobs.imagery import EncoderConfig
from rayjobs.jobs import cafo, cafo_eval
from rayjobs.tables import read_json, write_json
from tests.rayjobs.cafo_world import images, towers, world

FEW = ["space.shots=[1,3]", "space.seeds=[0,1]", "space.generated=[2]", "space.epochs=[2]", "search.beta_steps=20"]


def test_the_table_has_the_papers_shape() -> None:
    rows = [
        {"method": "CLIP zero-shot", "shots": None, "accuracy": 0.5},
        *[{"method": "CaFo", "shots": k, "accuracy": a} for k, a in ((1, 0.6), (1, 0.62), (16, 0.7), (16, 0.7))],
    ]
    columns, lines = table(rows, {"CaFo, published": {1: 91.85, 2: 92.37}, "of no use": {8: 93.83}})
    assert columns == ["method", "1 shot", "16 shots"]
    assert lines == [
        ["CLIP zero-shot", "50.00", "50.00"],
        ["CaFo", "61.00 ± 1.41", "70.00 ± 0.00"],
        ["CaFo, published", "91.85", ""],
    ]
    assert summary([0.25]) == "25.00"


def test_published_figures_stand_beside_the_same_data_and_encoders_only() -> None:
    clip = EncoderConfig(kind="clip", name="RN50-quickgelu", weights="openai")
    dino = EncoderConfig(kind="dino", weights="dino_resnet50_pretrain.pth")
    pair = {"clip": clip, "dino": dino}
    dtd = dict(zip(published.SHOTS, published.RN50["dtd"], strict=True))
    assert published_rows("dtd", "dtd", pair, []) == {"CaFo, published": dtd}
    vit = EncoderConfig(kind="clip", name="ViT-B-16", weights="openai")
    assert published_rows("imagenet", "imagenet", {"clip": vit, "dino": dino}, []) == {"CaFo, published": {16: 74.48}}
    for data_set, target, encoders in (
        ("dtd", "dtd", {"clip": vit, "dino": dino}),
        ("dtd", "dtd", {"clip": clip}),
        ("dtd", "imagenet_v2", pair),
        ("my own", "my own", pair),
        ("imagenet", "imagenet_v2", {"clip": vit, "dino": dino}),
    ):
        assert published_rows(data_set, target, encoders, []) == {}
    assert published_rows("imagenet", "imagenet_v2", pair, []) == {"CaFo, published": {16: 57.99}}


def test_the_cascades_rows_stand_beside_the_settings_that_are_theirs() -> None:
    clip = EncoderConfig(kind="clip", name="RN50", weights="openai")
    dino = EncoderConfig(kind="dino", weights="dino_resnet50_pretrain.pth")
    given = [
        ("clip only", 0, "templates"),
        ("dino only", 0, "templates"),
        ("dino only", 8, "templates"),  # the paper has no such row
        ("average", 0, "templates"),
        ("baseline clip", 8, "file"),
        ("baseline zero-shot", 0, "templates"),
        ("baseline zero-shot", 8, "templates"),
        ("baseline zero-shot", 0, "file"),
        ("baseline zero-shot", 8, "file"),
    ]
    settings = [{"encoders": ["clip", "dino"], "ensemble": e, "generated": g, "sentences": s} for e, g, s in given]
    rows = published_rows("imagenet", "imagenet", {"clip": clip, "dino": dino}, settings)
    assert {name.removesuffix(", published"): row[16] for name, row in rows.items()} == {
        "CLIP cache": 65.51,
        "DINO cache": 53.27,
        "CLIP + DINO": 68.08,
        "CLIP + DINO + DALL-E": 68.42,
        "CLIP + DINO + GPT-3": 68.51,
        "CaFo": 68.79,
    }
    assert rows["CaFo, published"][0] == 62.99


def test_a_sweep_that_has_not_chosen_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run of cafo-tune"):
        cafo_eval.run(cafo_eval.Config(sweep=str(tmp_path)))
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(ValueError, match="has not chosen yet"):
        cafo_eval.run(cafo_eval.Config(sweep=str(tmp_path)))


@pytest.mark.ray
def test_the_chain_opens_test_once_for_its_choice(tmp_path: Path, cluster: None) -> None:
    given = world(tmp_path)
    shifted = images(tmp_path / "shifted", {"train": 1, "val": 1, "test": 4}, seed=5)
    config = load(
        cafo.Config, None, [*given, *FEW, "data.name=colours", "run.name=chain", f"targets.shift.split={shifted}"]
    )
    result = cafo.run(config)["eval"]
    assert result["test_images"] == {"colours": 28, "shift": 16}
    test = config.run.folder / "test"
    rows = pq.read_table(test / "accuracy.parquet").to_pylist()
    assert len(rows) == 2 * (1 + 2 * 2)
    for name in ("per_class", "confusion"):
        whole = pq.read_table(test / f"{name}.parquet").to_pylist()
        assert sum(row["images"] for row in whole) == sum(row["images"] for row in rows)
    assert "| method | 1 shot | 3 shots |" in (test / "table.md").read_text()
    assert {path.suffix for path in test.iterdir()} == {".json", ".jsonl", ".parquet", ".md", ".csv", ".png"}

    evaluation = cafo_eval.Config(sweep=str(config.run.folder), plots=False)
    opened = read_json(test / "opened.json")
    accuracies = [row["accuracy"] for row in rows if row["target"] == "colours"]
    cafo_eval.run(evaluation)  # the same choice, the same answer
    again = pq.read_table(test / "accuracy.parquet").to_pylist()
    assert [row["accuracy"] for row in again] == accuracies
    assert read_json(test / "opened.json") == opened
    chosen = read_json(config.run.folder / "chosen.json")
    chosen["chosen"][0]["seeds"].pop()
    write_json(config.run.folder / "chosen.json", chosen)
    with pytest.raises(ValueError, match=r"opened on .* for another choice"):
        cafo_eval.run(evaluation)


@pytest.mark.ray
def test_caltech_from_images_to_the_test_table(tmp_path: Path, shared: Path, cluster: None) -> None:
    root = tmp_path / "data"
    shutil.copytree(shared / "few_shot", root)
    named = towers(tmp_path / "towers")
    given = [f"encoders.{name}.{key}={value}" for name, tower in named.items() for key, value in tower.items()]
    config = load(
        cafo.Config,
        None,
        [
            *given,
            "data.name=caltech101",
            f"data.root={root}",
            f"data.prompts={root / 'caltech_prompts.json'}",
            "features.views=2",
            "space.shots=[1,4]",
            "space.seeds=[1,2,3]",
            "space.epochs=[4]",
            "space.ensemble=[baseline zero-shot, dino only]",
            "search.compare=[ensemble]",
            "search.beta_steps=20",
            f"run.storage={tmp_path / 'runs'}",
            "run.name=caltech",
        ],
    )
    result = cafo.run(config)
    assert result["eval"]["test_images"] == {"caltech101": 337}
    assert list(result["eval"]["tables"]["caltech101"]) == ["CLIP zero-shot", "baseline zero-shot", "dino only"]
    assert result["tune"]["truncated_sentences"] > 0
