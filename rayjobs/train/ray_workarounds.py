"""Everything that relies on Ray internals because Ray has no public way yet."""

import json
import os
from contextlib import suppress
from typing import Any

import psutil
import ray.train
from pyarrow.fs import FileSystem, FileType
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.execution.callback import ControllerCallback

from rayjobs.train.checkpoint import _read


def delete_truncated_snapshot(storage: str) -> None:
    """Removes Ray's note of the checkpoints where a full disk has cut it off: Ray would refuse to start."""
    files, path = FileSystem.from_uri(storage)
    note = f"{path}/{CHECKPOINT_MANAGER_SNAPSHOT_FILENAME}"
    if files.get_file_info(note).type == FileType.NotFound:
        return
    try:
        json.loads(_read(files, note))
    except ValueError:
        files.delete_file(note)


class RefreshClusterResources(ControllerCallback):
    """Has Ray count what the cluster has at once when something failed: its own count (2.60) is up to 20 s old, and
    until the next one an elastic run would wait for workers on a machine that is lost."""

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        with suppress(Exception):  # without it the run goes on as well, only later
            coordinator = get_or_create_autoscaling_coordinator()
            ray.get(coordinator.get_reserved_resources.remote("", recompute=True), timeout=10)


class Network(TorchConfig):
    """Gloo on the network that Ray itself uses: by itself it takes the address of the machine's name, which on many
    machines is a loopback that no other one reaches."""

    @property
    def backend_cls(self) -> type:
        return _NetworkBackend


class _NetworkBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


def _choose_interface() -> None:
    ours = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == ours for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class Trainer(TorchTrainer):
    """Ray's cleaner of placement groups (2.60) does not answer when it is told to stop, and every run would end in the
    twelve seconds of waiting for it."""

    CLEANER_STOP_S = 0.5

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        for callback in callbacks:
            if isinstance(callback, PlacementGroupCleanerCallback):
                callback._stop_timeout = self.CLEANER_STOP_S
        return callbacks
