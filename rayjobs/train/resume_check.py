"""The identity of a training run: what its result depends on, by content. Only the same run is resumed or shown again.

It is in the run folder's `provenance.json`. A folder in which nothing has been trained yet may become another run's.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayjobs.config import to_dict
from rayjobs.errors import NonFiniteLossError, ProvenanceError
from rayjobs.runs.provenance import Change, comparable, find_changes, refuse_changes
from rayjobs.runs.record import RESULT_FILE, hold_run, read_record
from rayjobs.runs.run_dir import CONFIG_FILE, PROVENANCE_FILE, VERSIONS_FILE, versions
from rayjobs.storage.files import read_object, write_json
from rayjobs.storage.yaml_file import read_yaml
from rayjobs.train.checkpoint import list_checkpoints
from rayjobs.train.trainer import EXPERIMENT

logger = logging.getLogger(__name__)

FREE_AFTER_NONFINITE_LOSS = "optimizer."
"""Settings that may be changed to go on after a loss that was not finite."""


def check_same_run(folder: Path, settings: Any, identity: Mapping[str, Any], free: tuple[str, ...]) -> list[Change]:
    """Return what differs from the run in `folder` that may nevertheless go on in it; nothing for the same run.

    settings: the job's config. identity: what the result depends on, as plain values. free: keys of the config that the
    result does not depend on.

    Raises ProvenanceError, which names each difference with its old and its new value, if the folder holds a finished
    or partly trained run of another identity. After a loss that was not finite, other settings of the optimizer are let
    through.
    """
    record = read_record(folder)
    if record and record.job != settings.JOB:
        raise ProvenanceError(f"{folder} holds a run of {record.job}: choose another run.name")
    changes = _changes(folder, settings, identity, free)
    if not changes or not _has_trained(folder):
        return changes
    stopped = "nonfinite_loss" in _provenance(folder) and not (folder / RESULT_FILE).exists()
    refused = [change for change in changes if not (stopped and change.key.startswith(FREE_AFTER_NONFINITE_LOSS))]
    if refused:
        refuse_changes(folder, refused, f"choose another run.name, or remove that folder{_version_note(folder)}")
    return changes


def lock_run(folder: Path, settings: Any, identity: Mapping[str, Any], free: tuple[str, ...]) -> None:
    """Hold `folder`, and record the identity of the run that now begins or goes on in it; log what differs from before.

    Changes with which a run goes on stay in the record. Raises what `check_same_run` raises, and ResourceError if
    another process is running there.
    """
    hold_run(folder)
    changes = check_same_run(folder, settings, identity, free)
    provenance = _provenance(folder)
    differences = "; ".join(map(str, changes))
    if not _has_trained(folder):
        if changes:
            logger.warning("%s: nothing has been trained yet, so the run begins anew (%s)", folder.name, differences)
            for tracker in ("mlflow.json", "wandb.json"):  # a new run there too: it shows the settings of the old one
                (folder / tracker).unlink(missing_ok=True)
        provenance = {}
    elif changes:
        logger.warning("%s: goes on with other settings (%s)", folder.name, differences)
        entry = {"after": provenance.pop("nonfinite_loss"), "changes": [list(change) for change in changes]}
        provenance["changed_settings"] = [*provenance.get("changed_settings", []), entry]
    elif not provenance:
        logger.warning(
            "%s was begun by a version that did not record the content of its inputs%s; that they are the same cannot "
            "be checked",
            folder.name,
            _version_note(folder),
        )
    write_json(folder / PROVENANCE_FILE, {**provenance, "identity": comparable(dict(identity))})


def record_nonfinite_loss(folder: Path, error: NonFiniteLossError) -> None:
    """Record that a loss that was not finite has stopped the run, so that it may go on with another optimizer."""
    write_json(folder / PROVENANCE_FILE, {**_provenance(folder), "nonfinite_loss": str(error)})


def drop_keys(values: Mapping[str, Any], dropped: tuple[str, ...], prefix: str = "") -> dict[str, Any]:
    """Nested values without some keys, which are given dotted."""
    return {
        name: drop_keys(value, dropped, f"{prefix}{name}.") if isinstance(value, Mapping) else value
        for name, value in values.items()
        if f"{prefix}{name}" not in dropped
    }


def _changes(folder: Path, settings: Any, identity: Mapping[str, Any], free: tuple[str, ...]) -> list[Change]:
    """Differences from the recorded identity. A version without one recorded the settings, so these are compared."""
    if recorded := _provenance(folder).get("identity"):
        before, now = recorded, comparable(dict(identity))
    elif (folder / CONFIG_FILE).is_file():
        before, now = (
            comparable(drop_keys(values, free)) for values in (read_yaml(folder / CONFIG_FILE), to_dict(settings))
        )
    else:
        return []
    return list(find_changes(before, now, type(settings)))


def _has_trained(folder: Path) -> bool:
    return (folder / RESULT_FILE).exists() or bool(list_checkpoints(f"{folder}/{EXPERIMENT}"))


def _provenance(folder: Path) -> dict[str, Any]:
    path = folder / PROVENANCE_FILE
    return read_object(path) if path.is_file() else {}


def _version_note(folder: Path) -> str:
    """A note that names the version that the run was begun with, if it is not this one."""
    path = folder / VERSIONS_FILE
    before, now = read_object(path) if path.is_file() else {}, versions()
    if before.get("commit") in (None, now["commit"]):
        return ""
    names = [f"{'rayjobs ' + v['rayjobs'] + ', ' if 'rayjobs' in v else ''}commit {v['commit']}" for v in (before, now)]
    return f" (it was begun with {names[0]}; this is {names[1]})"
