"""Names from settings, lists, records and run folders of others do not lead out of the folder that they belong to."""

import json
from pathlib import Path

import pytest

from adapter.records.reader import read_records
from adapter.records.scienceqa import read_problems
from cafo import fewshot
from cafo.datasets import load_generated_list
from cafo.errors import CafoError, DatasetError
from rayjobs.config import load
from rayjobs.errors import ConfigError, DataError
from rayjobs.job_configs import cafo_eval
from rayjobs.reporting.figures import read_figures
from rayjobs.reporting.picture_sections import read_picture_sections
from rayjobs.reporting.report import _examples
from rayjobs.runs.run_dir import RunConfig
from rayjobs.storage.files import write_json
from rayjobs.storage.hub import HubPath
from rayjobs.tune.selection import ChosenSetting
from tests import sample_data

OUT = pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "a/../../b.png", "..", "..\\a.png"])


@OUT
def test_of_a_run_and_of_a_test_set(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        RunConfig(name=name, storage=str(tmp_path))
    with pytest.raises(ConfigError, match="letters, digits"):
        load(cafo_eval.Config, {"sweep": str(tmp_path), "targets": {name: {"name": "pets", "root": str(tmp_path)}}})


@pytest.mark.parametrize("path", ["hf://org/model/../x", "hf://org/model/a/../../x.gguf", "hf://datasets/org/d/.."])
def test_of_a_file_on_the_hub(path: str) -> None:
    with pytest.raises(ConfigError, match="a path on the hub is"):
        HubPath.parse(path)


@OUT
def test_of_images_in_lists(name: str, tmp_path: Path) -> None:
    generated, chosen = tmp_path / "list.json", tmp_path / "few_shot.json"
    write_json(generated, {"train": [[name, 0, "cat"]]})
    with pytest.raises(DatasetError, match="leads out of the folder"):
        load_generated_list(generated, ["cat"])
    write_json(chosen, {"items": [[name, 0, "cat"]], "shots": 1, "seed": 0, "short": {}})
    with pytest.raises(CafoError, match="leads out of the folder"):
        fewshot.load(chosen, ["cat"])


@OUT
def test_of_images_in_records(name: str, tmp_path: Path) -> None:
    path, turns = tmp_path / "records.jsonl", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"instruction": "a", "output": "b", "image": name},
        {"prompt": "a", "completion": "b", "image": name},
        {"messages": turns, "image": name},
        {"instruction": "a", "output": "b", "image": "below/it..png"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    *refused, used = read_records(path, keep_rejected=True)
    assert all("leads out of the folder of the images" in record["rejected"] for record in refused)
    assert "rejected" not in used


def test_of_images_of_problems(tmp_path: Path) -> None:
    folder = sample_data.write_scienceqa(tmp_path)
    path = next(folder.rglob("problems.json"))
    problems = json.loads(path.read_text())
    with_image = next(number for number, problem in problems.items() if problem["image"])
    problems[with_image]["image"] = "../../../../secret.png"
    write_json(path, problems)
    with pytest.raises(ValueError, match="leads out of the folder of the images"):
        read_problems(path.parent, problems[with_image]["split"])


@OUT
def test_of_files_that_a_report_shows(name: str, tmp_path: Path) -> None:
    section = {"title": "t", "note": "", "wide": False, "images": [{"file": name, "caption": ""}]}
    write_json(tmp_path / "figures.json", [{"file": name, "title": "t"}])
    write_json(tmp_path / "pictures.json", [section])
    write_json(tmp_path / "examples.json", {"note": "", "images": [{"file": name, "caption": ""}]})
    for read in (
        read_figures,
        lambda folder: list(read_picture_sections(folder)),
        lambda folder: list(_examples(folder)),
    ):
        with pytest.raises(DataError, match="leads out of this folder"):
            read(tmp_path)


@OUT
def test_of_trials_of_a_choice(name: str) -> None:
    numbers = dict.fromkeys(("generated", "views", "lr", "epochs", "alpha", "beta"), 1)
    setting = {**numbers, "encoders": ["clip"], "ensemble": "sum", "sentences": "templates"}
    trial = {"seed": 0, "trial": name, "accuracy": None, "alpha": None, "beta": None, "ensemble": None}
    choice = {"shots": 1, "method": "CaFo", "group": {}, "select": "val", "accuracy": None, "finished": 1, "stopped": 0}
    with pytest.raises(DataError, match="leads out of this folder"):
        ChosenSetting.from_json({**choice, "setting": setting, "seeds": [trial]})


def test_a_link_in_a_run_folder_is_replaced_and_not_followed(tmp_path: Path) -> None:
    outside, run = tmp_path / "outside.json", tmp_path / "r"
    outside.write_text("mine")
    run.mkdir()
    (run / "result.json").symlink_to(outside)
    write_json(run / "result.json", {})
    assert outside.read_text() == "mine"
    assert not (run / "result.json").is_symlink()
