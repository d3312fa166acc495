"""A sweep runs a trial again whose worker died, and does not run again one whose code has a fault."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cafo.methods.base import FewShotImages
from cafo.methods.gda import Discriminant, Gda
from rayjobs.tune.rivals import enumerate_rivals
from rayjobs.tune.sweep import Results, TrialPool, run_sweep
from tests.rayjobs.tune.test_rivals import space, with_rivals
from tests.rayjobs.tune.test_trial import SEARCH, K, shared_inputs


@dataclass(frozen=True, kw_only=True)
class CountedGda(Gda):
    """GDA that notes each of its runs in a file, and fails in the first ones."""

    log: str
    """path of the file"""
    failures: int
    kills: bool = False
    """end the worker's process instead of raising an error"""

    def fit(self, images: FewShotImages, seed: int) -> Discriminant:
        with open(self.log, "a") as file:
            file.write("run\n")
        if len(Path(self.log).read_text().split()) <= self.failures:
            if self.kills:
                os._exit(1)
            raise AttributeError("a fault of the method")
        return super().fit(images, seed)


def sweep(method: Any, folder: Path) -> Results:
    given = space("GDA")
    shared = with_rivals(shared_inputs({K: "leave_one_out"}), given)
    settings = enumerate_rivals(given, ["clip"], 3, file=False)
    search = replace(SEARCH, folds=2, estimate=False)
    return run_sweep(given, settings, replace(shared, rivals={"GDA": method}), search, folder, TrialPool(1, {"CPU": 1}))


@pytest.mark.ray
def test_a_fault_in_a_trials_code_is_met_once(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="a fault of the method") as caught:
        sweep(CountedGda(log=str(tmp_path / "log"), failures=1), tmp_path / "trials")
    assert isinstance(caught.value, AttributeError)
    assert (tmp_path / "log").read_text() == "run\n"


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_whose_worker_dies_is_run_again_but_not_for_ever(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="died"):
        sweep(CountedGda(log=str(tmp_path / "log"), failures=3, kills=True), tmp_path / "trials")
    assert (tmp_path / "log").read_text() == "run\n" * 3
