"""Each test here fails when Ray has made a workaround of rayjobs/train/ray_workarounds.py unnecessary."""

import inspect
from pathlib import Path

import pytest
from ray.exceptions import AuthenticationError
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.scaling_policy import elastic
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.state import util
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.state.exception import ServerUnavailable

from rayjobs.train import ray_workarounds
from rayjobs.train.ray_workarounds import (
    RefreshClusterResources,
    Trainer,
    dashboard_answers,
    delete_truncated_snapshot,
)


def test_ray_still_counts_resources_every_so_often_only() -> None:
    """Once the elastic policy asks for a new count after a failure, `RefreshClusterResources` can go."""
    assert "recompute=True" not in inspect.getsource(elastic)
    hook = RefreshClusterResources.before_controller_execute_failure_decision
    assert inspect.signature(hook).parameters.keys() == {"self", "failure_decision"}
    for base in RefreshClusterResources.__mro__[1:2]:
        assert hasattr(base, hook.__name__), "Ray no longer calls it"


def test_ray_still_refuses_to_start_on_a_truncated_snapshot(tmp_path: Path) -> None:
    """Once Ray starts in spite of it, `delete_truncated_snapshot` can go."""
    context = StorageContext(storage_path=str(tmp_path), experiment_dir_name="train", read_only=True)
    folder = tmp_path / "train"
    folder.mkdir(exist_ok=True)
    Path(context.checkpoint_manager_snapshot_path).write_text('{"ray_v')
    with pytest.raises(Exception, match=r"snapshot|JSON|Unterminated"):
        CheckpointManager(checkpoint_config=None, storage_context=context)
    delete_truncated_snapshot(str(folder))
    assert not list(folder.glob("*snapshot*"))


def test_ray_still_asks_the_dashboard_whether_a_training_lives() -> None:
    """Once its cleaner works without a dashboard, `Trainer` can go."""
    assert util.get_actor.__module__.startswith("ray.util.state")
    assert "get_actor(" in inspect.getsource(util.is_actor_alive)


def test_ray_still_handles_ctrl_c_in_the_main_thread_only() -> None:
    """Once it ends a training whose `fit` runs in another thread, `abort_training` can go."""
    assert "threading.main_thread()" in inspect.getsource(DataParallelTrainer)


@pytest.mark.ray
def test_the_cleaner_is_left_out_where_no_dashboard_answers(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not dashboard_answers()
    trainer = Trainer(print)

    def has_cleaner() -> bool:
        return any(isinstance(one, PlacementGroupCleanerCallback) for one in trainer._create_default_callbacks())

    def answer(node: object) -> object:
        if isinstance(node, Exception):
            raise node
        return node

    assert not has_cleaner()
    monkeypatch.setattr(ray_workarounds, "get_dashboard_url", lambda: "127.0.0.1:8265")
    for node in (ServerUnavailable(), AuthenticationError("another cluster"), KeyError("data"), None, "this node"):
        monkeypatch.setattr(ray_workarounds, "get_node", lambda *_, node=node, **__: answer(node))
        assert has_cleaner() == (node == "this node")
