"""Workarounds that rely on internals of Ray Train 2.60, because Ray has no public way.

tests/rayjobs/train/test_ray_workarounds.py fails when a workaround can go.
"""

import gc
import json
from contextlib import suppress
from typing import Any

import ray.train
from pyarrow.fs import FileSystem, FileType
from ray._private.worker import get_dashboard_url
from ray.actor import ActorHandle
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.execution.callback import ControllerCallback, RayTrainCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.util.state import get_node

from rayjobs.train.checkpoint import read_bytes

ABORTED_WITHIN_S = 60.0
"""Longest wait for a training that is told to end."""


def delete_truncated_snapshot(storage: str) -> None:
    """Delete Ray's record of the checkpoints if a full disk has cut it off: Ray would refuse to start.

    storage: Train's folder, a path or URI. Resume then uses the listing of that folder.
    """
    files, path = FileSystem.from_uri(storage)
    snapshot = f"{path}/{CHECKPOINT_MANAGER_SNAPSHOT_FILENAME}"
    if files.get_file_info(snapshot).type == FileType.NotFound:
        return
    try:
        json.loads(read_bytes(files, snapshot))
    except ValueError:
        files.delete_file(snapshot)


def abort_training() -> None:
    """End the training that this process has begun, if there is one, and free what its workers reserve.

    Ray itself ends a training at Ctrl-C only if `fit` runs in the main thread. Without that the training goes on as
    long as this process, a notebook for instance. And if this process ends, the workers' placement group stays on a
    cluster without a dashboard, which has no cleaner (see `Trainer`).
    """
    for handle in [one for one in gc.get_objects() if type(one) is ActorHandle]:
        if handle._ray_actor_creation_function_descriptor.class_name == TrainController.__name__:
            with suppress(ray.exceptions.RayError):  # it ends instead of answering, or has ended before
                ray.get(handle.abort.remote(), timeout=ABORTED_WITHIN_S)


class Trainer(TorchTrainer):
    """A TorchTrainer that starts Ray Train's cleaner only on a cluster whose dashboard answers.

    The cleaner frees the workers' placement group once the training's controller has died, and asks the dashboard
    whether it has. Where the cluster has none, Ray asks at the address that another cluster on this machine has left in
    a file: the cleaner may then take a training that goes on for a dead one, and end it, or wait for a cluster that is
    gone, which delays the end of a short training by 12 s.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks = super()._create_default_callbacks()
        if dashboard_answers():
            return callbacks
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]


def dashboard_answers() -> bool:
    """Return whether the connected cluster has a dashboard that knows this node.

    Only the driver that has started the cluster without one can tell at once. Ray tells all others the default address,
    where nothing may listen, or anything.
    """
    if not get_dashboard_url():
        return False
    context = ray.get_runtime_context()
    try:
        return get_node(context.get_node_id(), address=context.gcs_address, timeout=10) is not None
    except Exception:  # whatever it is that answers there
        return False


class RefreshClusterResources(ControllerCallback):
    """Let Ray count the cluster's resources again as soon as workers have failed.

    Ray counts them every 20 s otherwise, and until the next count an elastic run waits for workers on a lost node.
    """

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        with suppress(Exception):  # without a new count the run recovers too, only later
            coordinator = get_or_create_autoscaling_coordinator()
            ray.get(coordinator.get_reserved_resources.remote("", recompute=True), timeout=10)
