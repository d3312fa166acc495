"""What Ray Data's tasks import: a worker process starts faster by the seconds that torch takes."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("module", ["feature_decoding", "image_reading", "image_source", "sampler", "token_store"])
def test_tasks_do_not_import_torch(module: str) -> None:
    code = f"import sys, rayjobs.data.{module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
