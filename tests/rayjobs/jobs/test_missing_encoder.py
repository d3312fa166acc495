"""An image encoder that cannot be loaded is told before Ray starts, and before a class is described."""

from pathlib import Path
from typing import Any

import pytest

from cafo.errors import EncoderError
from rayjobs.config import load
from rayjobs.jobs import cafo, cafo_features, cafo_prompt, cafo_tune
from tests.rayjobs.cafo_dataset import make_dataset


@pytest.mark.parametrize("job", [cafo_features, cafo_tune, cafo], ids=lambda job: job.Config.JOB)
def test_an_encoder_that_is_missing_is_told_first(job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [
        *make_dataset(tmp_path),
        "encoders.clip.weights=nowhere.pt",
        "encoders.clip.name=RN50",
        "data.short_classes=report",
        "run.name=r",
    ]
    if job is cafo:
        given = [one for one in given if not one.startswith("data.prompts")] + [
            "prompt.source=endpoint",
            "prompt.endpoint.model=m",
        ]
    else:
        monkeypatch.setattr(job, "connect", lambda *_: pytest.fail("Ray starts"))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setattr(cafo_prompt, "run", lambda _: pytest.fail("a class is described"))
    with pytest.raises(EncoderError, match=r"'nowhere\.pt' is neither a file, nor a folder, nor a tag"):
        job.run(load(job.Config, None, given))
    assert not (tmp_path / "runs").exists()
