"""A part of a run that has a lease of its own, such as a trial of a sweep, goes to another driver with the run."""

from dataclasses import replace
from pathlib import Path

import pytest

from rayjobs.errors import LeaseLostError, ResourceError
from rayjobs.storage import lease as leases
from rayjobs.storage.files import write_json
from rayjobs.storage.lease import EXPIRES_S, hold, lost_lease, release
from rayjobs.storage.lease_files import DRIVER_VARIABLE, Holder, LeaseFiles
from tests.rayjobs.storage.conftest import ELSEWHERE, Clock


def test_who_holds_a_part_of_a_run_loses_it_with_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a trial of a sweep, whose own lease nobody has taken over yet."""
    run, trial = LeaseFiles(folder), folder / "trials" / "x"
    run.create(1, replace(ELSEWHERE, driver="first"))
    monkeypatch.setenv(DRIVER_VARIABLE, "first")
    hold(trial)
    ours = leases._held[str(trial)]
    ours.beat()
    write_json(trial / "trial.json", "first")
    run.create(2, replace(ELSEWHERE, driver="second", superseded=("first",)))
    with pytest.raises(LeaseLostError, match="is now run by process 4711 of node-7"):
        write_json(trial / "trial.json", "late")
    with pytest.raises(LeaseLostError):
        ours.beat()
    assert LeaseFiles(trial).newest().holder.beat == 1
    assert lost_lease(trial)
    with pytest.raises(LeaseLostError):
        hold(folder / "trials" / "y")
    release(trial)
    with pytest.raises(LeaseLostError):  # as another worker of that driver
        write_json(trial / "trial.json", "late")
    monkeypatch.setenv(DRIVER_VARIABLE, "second")
    write_json(trial / "trial.json", "second")


@pytest.mark.parametrize("run_is_lost", [True, False])
@pytest.mark.parametrize("last_beat_s", [4, 1000])
def test_a_part_of_a_run_is_waited_for_until_the_one_before_has_noticed(
    folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, run_is_lost: bool, last_beat_s: int
) -> None:
    """Even if its process, of this machine, lives."""
    trial = folder / "trials" / "x"
    LeaseFiles(folder).create(2, replace(ELSEWHERE, superseded=("first",) if run_is_lost else ()))
    monkeypatch.setenv(DRIVER_VARIABLE, "first")
    its = Holder.here(None)
    LeaseFiles(trial).create(1, its)
    monkeypatch.setenv(DRIVER_VARIABLE, "other")

    def beat() -> None:
        if clock.now - 1000 <= last_beat_s:
            LeaseFiles(trial).write(1, replace(its, beat=int(clock.now)))

    clock.meanwhile = beat
    if run_is_lost and last_beat_s == 4:
        hold(trial)
        release(trial)
    else:
        with pytest.raises(ResourceError, match="is being run by process"):
            hold(trial)
    waited = clock.now - 1000
    assert waited == (0 if not run_is_lost else EXPIRES_S + 4 if last_beat_s == 4 else EXPIRES_S)
