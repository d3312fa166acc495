"""A job that can never fit is told so before any work; what an autoscaler may bring counts as there."""

import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import requests
import yaml

from rayjobs.__main__ import main
from rayjobs.cluster.capacity import Capacity, autoscaler_capacity, cluster_capacity
from rayjobs.cluster.ray_workarounds import find_kuberay_config
from rayjobs.cluster.remote_model import RemoteModel, load_on_gpu
from rayjobs.cluster.worker_pool import RAY_DATA_CPUS, WorkerPoolConfig
from tests.conftest import ROOT
from tests.rayjobs.cafo_dataset import make_dataset


def placed(nodes: list[dict[str, float]], worker: dict[str, float]) -> int:
    """Workers put one after the other wherever there is room."""
    free, count = [dict(node) for node in nodes], 0
    while home := next((node for node in free if all(node.get(n, 0) >= worker[n] for n in worker)), None):
        for name in worker:
            home[name] -= worker[name]
        count += 1
    return count


def test_room_is_what_can_be_placed_on_whole_nodes() -> None:
    draw = random.Random(0)
    for _ in range(200):
        nodes = [{"CPU": draw.randint(1, 9), "GPU": draw.randint(0, 4)} for _ in range(5)]
        worker = {"CPU": draw.choice([0.5, 1, 2, 3]), "GPU": draw.choice([0.5, 1, 2])}
        assert Capacity(nodes=tuple(nodes)).max_workers(worker) == placed(nodes, worker)
        at_most = draw.randint(1, 3)
        grown = Capacity(nodes=tuple(nodes[:2]), addable=tuple(nodes[2:]), max_added=at_most)
        chosen = itertools.combinations(nodes[2:], at_most)
        assert grown.max_workers(worker) == max(placed([*nodes[:2], *more], worker) for more in chosen)


def test_three_nodes_of_three_cpus_hold_three_workers_of_two() -> None:
    nodes = ({"CPU": 3.0},) * 3
    assert Capacity(nodes=nodes).max_workers({"CPU": 2}) == 3
    assert Capacity(nodes=nodes).max_workers({"CPU": 2}, reserved_cpus=1.5) == 0


def test_a_cluster_scaled_to_zero_has_what_its_file_may_bring() -> None:
    given = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    have = autoscaler_capacity(given, [{"CPU": 4.0}])
    assert have.max_workers({"CPU": 1, "GPU": 1}, RAY_DATA_CPUS) == 8, "types of 8 and 4 nodes, 8 at most"
    assert str(have) == "1 node and up to 8 more, 68 CPU and 8 GPU in all"


def test_workers_take_gpus_where_there_are_any_and_never_fall_back_to_cpus_in_silence() -> None:
    four = Capacity(nodes=({"CPU": 8.0, "GPU": 4.0},))
    assert WorkerPoolConfig(workers=4).fit(four, RAY_DATA_CPUS) == {"CPU": 1.0, "GPU": 1.0}
    with pytest.raises(ValueError, match=r"5 workers of 1 CPU and 1 GPU each .* room for 4.*; gpus_per_worker=0 runs"):
        WorkerPoolConfig(workers=5).fit(four, RAY_DATA_CPUS)
    assert WorkerPoolConfig(workers=5, gpus_per_worker=0.5).fit(four, RAY_DATA_CPUS) == {"CPU": 1.0, "GPU": 0.5}
    assert WorkerPoolConfig(workers=5, gpus_per_worker=0).fit(four, RAY_DATA_CPUS) == {"CPU": 1.0}
    with pytest.raises(ValueError, match=r"the cluster has no GPU yet, .*set gpus_per"):
        WorkerPoolConfig(workers=5).fit(Capacity(nodes=({"CPU": 2.0},), is_upper_limit=False), RAY_DATA_CPUS)


def test_bounds_fit_where_the_fewest_do() -> None:
    nodes = Capacity(nodes=({"CPU": 2.0},) * 3)
    assert WorkerPoolConfig(workers={"min": 1, "max": 30}).fit(nodes, RAY_DATA_CPUS) == {"CPU": 1.0}
    assert WorkerPoolConfig(workers=6).fit(nodes, RAY_DATA_CPUS) == {"CPU": 0.5}
    with pytest.raises(ValueError, match=r"4 workers of 1\.5 CPU each can never run: there is room for 3"):
        WorkerPoolConfig(workers={"min": 4, "max": 30}, cpus_per_worker=1.5).fit(nodes, RAY_DATA_CPUS)


@pytest.mark.ray
def test_every_job_says_at_once_what_it_asked_for_and_what_there_is(
    cluster: None, tiny_base: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = [f"base.path={tiny_base}", f"data.path=[{records}]", f"run.storage={tmp_path / 'runs'}"]
    axes = "sweep.axes={train.epochs: [1]}"
    images, one = make_dataset(tmp_path), ["space.shots=[1]", "space.seeds=[0]"]
    for job, given, section in (
        ("adapter-train", [*adapter, "adapter.n_layers=2"], "scale"),
        ("adapter-tune", [*adapter, "adapter.n_layers=2", axes, "sweep.at_once=2"], "scale"),
        ("adapter-eval", adapter, "scale"),
        ("cafo-features", [*images, "shots=2"], "scale"),
        ("cafo-tune", [*images, *one], "scale"),
        ("cafo-tune", [*images, *one], "trials"),
    ):
        name = f"run.name={job}-{section}"
        assert main([job, *given, name, f"{section}.workers=2", f"{section}.cpus_per_worker=999"]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert "workers of 999 CPU" in line
        assert "can never run: there is room for 0; the cluster has 1 node, " in line
    assert not (tmp_path / "runs" / "cache").exists(), "before any work"


@pytest.mark.ray
def test_a_machine_of_ones_own_that_is_off_may_still_come(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for workers, known in (([], True), (["10.0.0.2"], False)):
        file = {"provider": {"type": "local", "worker_ips": workers}, "max_workers": len(workers)}
        monkeypatch.setattr("rayjobs.cluster.capacity.find_autoscaler_config", lambda _, file=file: file)
        assert cluster_capacity().is_upper_limit == known
    assert WorkerPoolConfig(workers=99, gpus_per_worker=0).resources() == {"CPU": 1.0}, "it waits"


@pytest.mark.ray
def test_a_machine_of_ones_own_that_was_lost_is_known_by_what_it_had(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = {"provider": {"type": "local", "worker_ips": ["10.0.0.2", "10.0.0.3"]}, "max_workers": 2}
    monkeypatch.setattr("rayjobs.cluster.capacity.find_autoscaler_config", lambda _: file)
    lost = {"10.0.0.2": {"CPU": 64.0, "GPU": 8.0}, "10.0.0.9": {"CPU": 1.0, "GPU": 1.0}}
    monkeypatch.setattr("rayjobs.cluster.capacity.resources_of_lost_nodes", lambda: lost)
    one_unknown = cluster_capacity()
    assert (one_unknown.total("GPU"), one_unknown.is_upper_limit) == (8, False)
    lost["10.0.0.3"] = {"CPU": 32.0}
    all_known = cluster_capacity()
    assert (all_known.total("GPU"), all_known.is_upper_limit) == (8, True)
    assert all_known.total("CPU") == ray.cluster_resources()["CPU"] + 96
    lost["10.0.0.2"] = {"CPU": 1.0}
    assert WorkerPoolConfig(workers=2).resources()["CPU"] == 1.0, "on CPUs, since no machine has had a GPU"


@pytest.mark.ray
def test_ray_data_keeps_a_share_of_every_node(cluster: None) -> None:
    cpus = ray.cluster_resources()["CPU"]
    assert WorkerPoolConfig(workers=1, cpus_per_worker=cpus - RAY_DATA_CPUS).resources() == {
        "CPU": cpus - RAY_DATA_CPUS
    }
    with pytest.raises(ValueError, match=r"every node keeps 0\.5 CPU for Ray Data"):
        WorkerPoolConfig(workers=1, cpus_per_worker=cpus).resources()
    assert WorkerPoolConfig(workers=1, cpus_per_worker=cpus).resources(reserved_cpus=0) == {"CPU": cpus}


@pytest.fixture
def kuberay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The pod of the head of `configs/cluster/kuberay.yaml`; the RayCluster that Kubernetes' API shows to it."""
    job = yaml.safe_load((ROOT / "configs" / "cluster" / "kuberay.yaml").read_text())
    shown = {"metadata": {"name": "adapter-train-abc", "namespace": "team"}, "spec": job["spec"]["rayClusterSpec"]}
    (tmp_path / "namespace").write_text("team\n")
    monkeypatch.setattr("rayjobs.cluster.ray_workarounds.KUBERNETES_NAMESPACE", tmp_path / "namespace")
    monkeypatch.setenv("RAY_CLUSTER_NAME", "adapter-train-abc")
    monkeypatch.setenv("KUBERAY_GEN_RAY_START_CMD", "ray start --head --no-monitor --num-cpus=0")

    def get(client: Any, path: str) -> dict[str, Any]:
        if (client._namespace, path) != ("team", "rayclusters/adapter-train-abc") or not shown:
            raise requests.HTTPError("403 Client Error: Forbidden")
        return shown

    monkeypatch.setattr("ray.autoscaler._private.kuberay.node_provider.KubernetesHttpApiClient.get", get)
    return shown


def test_a_cluster_on_kubernetes_scaled_to_zero_has_what_its_operator_may_bring(kuberay: dict[str, Any]) -> None:
    config = find_kuberay_config()
    have = autoscaler_capacity(config, [{"CPU": 0.0}])
    assert str(have) == "1 node and up to 4 more, 32 CPU and 4 GPU in all"
    assert WorkerPoolConfig(workers=4).fit(have, RAY_DATA_CPUS) == {"CPU": 1.0, "GPU": 1.0}
    with pytest.raises(ValueError, match="5 workers of 1 CPU and 1 GPU each can never run: there is room for 4"):
        WorkerPoolConfig(workers=5).fit(have, RAY_DATA_CPUS)


def test_limits_on_kubernetes_that_may_not_be_read_are_unknown(
    kuberay: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kuberay.clear()
    assert find_kuberay_config() is None
    monkeypatch.setenv("KUBERAY_GEN_RAY_START_CMD", "ray start --address=head:6379")
    assert find_kuberay_config() is None, "a worker's pod"


@pytest.mark.ray
def test_one_model_asks_for_a_gpu_that_the_operator_may_bring(
    cluster: None, kuberay: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cluster_capacity().total("GPU") == 4
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    asked: list[dict[str, float]] = []

    class Placed:
        """An actor's class that only notes what was asked for."""

        load = SimpleNamespace(remote=lambda load: ray.put(None))

        def options(self, **resources: float) -> "Placed":
            asked.append(resources)
            return self

        def remote(self) -> "Placed":
            return self

    monkeypatch.setattr("rayjobs.cluster.remote_model.default_device", lambda: "cpu")
    monkeypatch.setattr(ray, "remote", lambda cls: Placed())
    assert isinstance(load_on_gpu(lambda device: device), RemoteModel)
    assert asked == [{"num_cpus": 1, "num_gpus": 1}]
