"""A run folder belongs to one run, known by content: the same resumes, another is refused key by key."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayjobs.config import load, to_dict
from rayjobs.errors import NonFiniteLossError, ProvenanceError, ResourceError
from rayjobs.jobs import adapter_train
from rayjobs.runs.run_dir import open_run
from rayjobs.storage.files import read_json, write_json
from rayjobs.storage.lease import release
from rayjobs.storage.lease_files import Holder, LeaseFiles
from rayjobs.storage.yaml_file import read_yaml, write_yaml
from rayjobs.train.resume_check import PROVENANCE_FILE, lock_run, record_nonfinite_loss
from tests.conftest import make_base
from tests.rayjobs.cafo_dataset import make_encoders


class Run:
    """A run of adapter-train on copies of its inputs, as its driver begins and resumes it; nothing is trained."""

    def __init__(self, folder: Path, base: Path, records: Path) -> None:
        self.folder = folder / "runs" / "r"
        self.base, self.records = folder / "base", folder / "records.jsonl"
        shutil.copytree(base, self.base)
        shutil.copy(records, self.records)
        self.overrides = [
            f"base.path={self.base}",
            f"data.path=[{self.records}]",
            "adapter.n_layers=2",
            f"run.storage={folder / 'runs'}",
            "run.name=r",
        ]

    def begin(self, *more: str) -> None:
        """Begin or resume, up to the work."""
        settings = load(adapter_train.Config, None, [*self.overrides, *more])
        inputs = adapter_train.check(settings)
        identity = adapter_train.identify(settings, inputs)
        lock_run(settings.run.folder, settings, identity, adapter_train.FREE_TO_CHANGE)
        open_run(settings.run, settings)

    def save_checkpoint(self) -> None:
        (self.folder / "train" / "checkpoint_00000050").mkdir(parents=True)

    def refused(self, *more: str) -> str:
        with pytest.raises(ProvenanceError) as raised:
            self.begin(*more)
        return str(raised.value)

    def change_record(self) -> None:
        """Give the first record another output, in a file of the same size and time."""
        times = self.records.stat()
        text = self.records.read_text()
        output = text.splitlines()[0].split('"')[-2]
        self.records.write_text(text.replace(output, output[::-1], 1))
        os.utime(self.records, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert self.records.stat().st_size == times.st_size


@pytest.fixture
def run(tmp_path: Path, tiny_base: Path, records: Path) -> Run:
    run = Run(tmp_path, tiny_base, records)
    run.begin()
    return run


@pytest.fixture
def trained(run: Run) -> Run:
    run.save_checkpoint()
    return run


def test_other_records_at_the_same_path_are_refused_with_both_digests(trained: Run) -> None:
    (before,) = read_json(trained.folder / PROVENANCE_FILE)["identity"]["data"]["path"]
    trained.change_record()
    message = trained.refused()
    assert f"data.path[0].records was {before['records']}, now " in message
    assert "choose another run.name" in message
    assert read_json(trained.folder / PROVENANCE_FILE)["identity"]["data"]["path"] == [before]


def test_a_finished_run_is_not_shown_for_other_records(run: Run) -> None:
    write_json(run.folder / "result.json", {"headline": "4.179 → 3.306"})
    run.change_record()
    assert "data.path[0].records was " in run.refused()


def test_other_validation_records_are_refused(trained: Run) -> None:
    assert "data.val_path was []" in trained.refused(f"data.val_path=[{trained.records}]")


def test_another_base_at_the_same_path_is_refused(trained: Run) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(trained.base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, trained.base / "model.safetensors", metadata={"format": "pt"})
    assert "base.path was " in trained.refused()


def test_another_tokenizer_at_the_same_path_is_refused(trained: Run, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    syllables = [f"{a}{b}" for a in "bcdfghjklmnp" for b in "aeiou"]
    sentences = [" ".join(first + second for second in syllables) for first in syllables]
    other = make_base(tmp_path / "other", sentences)
    shutil.copy(other / "tokenizer.model", trained.base / "tokenizer.model")
    assert "base.tokenizer was " in trained.refused()


def test_another_template_at_the_same_path_is_refused(run: Run, tmp_path: Path) -> None:
    template = tmp_path / "template.json"
    texts = {"with_input": "{instruction} {input}:", "without_input": "{instruction}:"}
    template.write_text(json.dumps(texts))
    run.begin(f"data.template={template}")
    run.save_checkpoint()
    template.write_text(json.dumps({**texts, "without_input": "{instruction}?"}))
    assert "data.path[0].template was " in run.refused(f"data.template={template}")


def test_other_images_or_another_encoder_at_the_same_path_are_refused(
    tmp_path: Path, tiny_base: Path, pictured: Path
) -> None:
    shutil.copytree(pictured.parent, tmp_path / "pictured")
    encoders = make_encoders(tmp_path / "encoders")
    run = Run(tmp_path, tiny_base, pictured)
    run.overrides += [f"data.path=[{tmp_path / 'pictured' / pictured.name}]", "vision.bottleneck=7"]
    run.overrides += [f"vision.encoder.{key}={value}" for key, value in encoders["clip"].items()]
    run.begin()
    run.save_checkpoint()
    image = tmp_path / "pictured" / "plain.png"
    content = image.read_bytes()
    image.write_bytes((tmp_path / "pictured" / "animated.gif").read_bytes())
    assert "data.path[0].images was " in run.refused()
    image.write_bytes(content)
    run.begin()
    (weights,) = Path(encoders["clip"]["weights"]).glob("*.safetensors")
    from safetensors.torch import load_file, save_file

    save_file({name: tensor + 1e-3 for name, tensor in load_file(weights).items()}, weights)
    assert "vision.encoder was " in run.refused()


def test_equal_content_elsewhere_and_at_another_time_resumes(trained: Run, tmp_path: Path) -> None:
    os.utime(trained.records, (1, 1))
    trained.begin()
    moved = tmp_path / "moved.jsonl"
    shutil.move(trained.records, moved)
    shutil.move(trained.base, tmp_path / "moved_base")
    trained.begin(f"data.path=[{moved}]", f"base.path={tmp_path / 'moved_base'}")


def test_settings_that_do_not_change_the_result_may_differ(trained: Run) -> None:
    free = ["scale.workers=3", "zero.stage=3", "train.token_budget=77", "train.checkpoint_activations=true"]
    trained.begin(*free, "data.max_rejected_fraction=1", "train.checkpoint_every_steps=3")


def test_each_setting_that_differs_is_named_with_both_values(trained: Run) -> None:
    message = trained.refused("train.epochs=3", "optimizer.betas=[0.9, 0.99]", "adapter.method=prefix")
    assert "train.epochs was 5.0, now 3.0" in message
    assert "optimizer.betas[1] was 0.95, now 0.99" in message
    assert "adapter.method was zero_init, now prefix" in message
    assert "warmup" not in message


def test_where_nothing_has_been_trained_another_run_begins_anew(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    from rayjobs.console import setup_logging

    setup_logging()
    run.begin("train.epochs=3")
    told = "nothing has been trained yet, so the run begins anew (train.epochs was 5.0, now 3.0)"
    assert told in capsys.readouterr().err
    run.save_checkpoint()
    assert "train.epochs was 3.0, now 5.0" in run.refused()


def test_a_setting_that_a_later_release_adds_counts_as_its_default(trained: Run) -> None:
    path = trained.folder / PROVENANCE_FILE
    recorded = read_json(path)
    del recorded["identity"]["train"]["validate_every_steps"]
    del recorded["identity"]["optimizer"]  # a whole section
    write_json(path, recorded)
    assert "optimizer.base_lr was 0.009, now 1.0" in trained.refused("optimizer.base_lr=1")
    assert "train.validate_every_steps was None, now 7" in trained.refused("train.validate_every_steps=7")
    trained.begin()


def test_a_setting_that_a_later_release_no_longer_has_is_named(trained: Run) -> None:
    path = trained.folder / PROVENANCE_FILE
    recorded = read_json(path)
    recorded["identity"]["train"]["rewind"] = True
    write_json(path, recorded)
    assert "train.rewind was True, unknown to this version" in trained.refused()


def test_a_run_of_the_version_before_resumes_if_its_settings_are_the_same(
    trained: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """That version wrote no identity."""
    from rayjobs.console import setup_logging

    setup_logging()
    (trained.folder / PROVENANCE_FILE).unlink()
    write_json(trained.folder / "versions.json", {"commit": "1a2b3c4"})
    assert "train.epochs was 5.0, now 3.0" in trained.refused("train.epochs=3")
    trained.begin()
    assert "did not record the content of its inputs (it was begun with commit 1a2b3c4; this is " in (
        capsys.readouterr().err
    )
    trained.change_record()
    assert "data.path[0].records was " in trained.refused(), "from now on it is recorded"


def test_a_key_that_was_renamed_since_is_named_with_the_version(trained: Run, vision: list[str]) -> None:
    (trained.folder / PROVENANCE_FILE).unlink()
    settings = read_yaml(trained.folder / "config.yaml")
    encoder = dict(item.removeprefix("vision.encoder.").split("=", 1) for item in vision[:-1])
    new = to_dict(load(adapter_train.Config, None, [*trained.overrides, *vision]))["vision"]
    settings["vision"] = {"tower" if name == "encoder" else name: value for name, value in new.items()}
    write_yaml(trained.folder / "config.yaml", settings)
    write_json(trained.folder / "versions.json", {"commit": "1a2b3c4"})
    message = trained.refused(*vision)
    assert "vision.tower was " in message
    assert "unknown to this version" in message
    assert encoder["kind"] in message
    assert "begun with commit 1a2b3c4; this is rayjobs" in message


def test_after_a_loss_that_was_not_finite_the_optimizer_may_change_and_nothing_else(trained: Run) -> None:
    assert "optimizer.base_lr was 0.009, now 0.001" in trained.refused("optimizer.base_lr=1e-3")
    record_nonfinite_loss(trained.folder, NonFiniteLossError("the loss became nan at step 51"))
    assert "train.epochs was 5.0, now 3.0" in trained.refused("optimizer.base_lr=1e-3", "train.epochs=3")
    trained.begin("optimizer.base_lr=1e-3", "optimizer.clip_norm=1")
    provenance = read_json(trained.folder / PROVENANCE_FILE)
    assert provenance["changed_settings"] == [
        {
            "after": "the loss became nan at step 51",
            "changes": [["optimizer.base_lr", 0.009, 0.001], ["optimizer.clip_norm", None, 1.0]],
        }
    ]
    assert "optimizer.base_lr was 0.001, now 0.009" in trained.refused("optimizer.clip_norm=1")
    trained.begin("optimizer.base_lr=1e-3", "optimizer.clip_norm=1")


def test_a_finished_run_is_not_another_one_s_after_a_loss_that_was_not_finite(trained: Run) -> None:
    record_nonfinite_loss(trained.folder, NonFiniteLossError("the loss became nan at step 51"))
    write_json(trained.folder / "result.json", {})
    assert "optimizer.base_lr was" in trained.refused("optimizer.base_lr=1e-3")


def test_the_folder_of_another_job_is_refused(run: Run) -> None:
    record: dict[str, Any] = read_json(run.folder / "run.json")
    write_json(run.folder / "run.json", {**record, "job": "cafo-tune"})
    assert "holds a run of cafo-tune" in run.refused()


def test_the_record_of_a_run_that_another_process_is_running_is_left_alone(run: Run) -> None:
    path = run.folder / PROVENANCE_FILE
    before = path.read_text()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        release(run.folder)
        held = Holder.here(None)
        assert LeaseFiles(run.folder).create(99, replace(held, driver="other", pid=other.pid, pid_since=0.0))
        with pytest.raises(ResourceError, match=f"is being run by process {other.pid}"):
            run.begin("train.epochs=3")
    assert path.read_text() == before
