"""The cluster files: what Ray's own schema and defaults make of them, and what they must not open."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rayjobs.submit import submit_command
from tests.conftest import ROOT

FILES = [ROOT / "cluster.yaml", *(ROOT / "configs" / "cluster" / f"{name}.yaml" for name in ("onprem", "gcp"))]


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def prepared(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A file with Ray's defaults filled in, as `ray up` would take it."""
    from ray.autoscaler._private import util

    given = yaml.safe_load(request.param.read_text())
    made = util.prepare_config(given)
    util.validate_config(made)
    return made


def test_is_what_ray_up_takes_and_opens_nothing(prepared: dict[str, Any]) -> None:
    starts = [*prepared["head_start_ray_commands"], *prepared["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    (head,) = [command for command in prepared["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in head
    assert prepared["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert {".venv", "runs", "data"} <= set(prepared["rsync_exclude"])
    for rule in prepared["provider"].get("security_group", {}).get("IpPermissions", []):
        assert (rule["FromPort"], rule["ToPort"]) == (22, 22)


def test_workers_come_and_go_and_spot_has_a_fallback(prepared: dict[str, Any]) -> None:
    if prepared["provider"]["type"] == "local":
        pytest.skip("machines of one's own neither come nor go")
    kinds = prepared["available_node_types"]
    assert all(kind["min_workers"] == 0 for kind in kinds.values())
    assert kinds["gpu_spot"]["resources"] == kinds["gpu_on_demand"]["resources"]
    assert "GPU" not in kinds[prepared["head_node_type"]]["resources"]


def test_the_image_is_the_ray_that_was_tested() -> None:
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    version = pinned.removeprefix("ray==")
    for name in ("cluster.yaml", "configs/cluster/gcp.yaml", "configs/cluster/kuberay.yaml"):
        assert version in (ROOT / name).read_text(), name


def test_the_kubernetes_file_has_the_fields_of_a_ray_job() -> None:
    job = yaml.safe_load((ROOT / "configs" / "cluster" / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job["spec"]) <= {
        "entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec",
    }  # fmt: skip
    cluster = job["spec"]["rayClusterSpec"]
    assert set(cluster) <= {"rayVersion", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"}
    assert set(cluster["headGroupSpec"]) <= {"rayStartParams", "template"}
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in group["template"]["spec"]["volumes"]}
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_command_for_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = submit_command("adapter-train", str(ROOT / "configs/adapter/alpaca_7b.yaml"), ["run.storage=/mnt/runs"])
    assert command == [
        "ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "rayjobs", "adapter-train",
        "--config", "configs/adapter/alpaca_7b.yaml", "run.storage=/mnt/runs",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="is not below"):
        submit_command("adapter-train", str(tmp_path / "mine.yaml"), [])
