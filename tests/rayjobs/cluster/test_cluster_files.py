"""The cluster files: what Ray and an imitation of AWS make of them, and what they must not open or upload."""

import contextlib
import re
import shlex
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayjobs.cluster.job_submission import job_command, ray_submit_command
from rayjobs.config import load
from rayjobs.jobs import adapter_train
from tests.conftest import ROOT

FILES = [ROOT / "cluster.yaml", *(ROOT / "configs" / "cluster" / f"{name}.yaml" for name in ("onprem", "gcp"))]
CLOUDS = pytest.mark.parametrize("prepared", [FILES[0], FILES[2]], ids=["cluster", "gcp"], indirect=True)
"""Machines of one's own neither come nor go, and have no price."""
NOT_UPLOADED = {".git", ".venv", "runs", "data", "weights"}


def prepare(given: dict[str, Any]) -> dict[str, Any]:
    """A file with Ray's defaults filled in, as `ray up` would take it."""
    from ray.autoscaler._private import util

    made = util.prepare_config(given)
    util.validate_config(made)
    return made


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def prepared(request: pytest.FixtureRequest) -> dict[str, Any]:
    return prepare(yaml.safe_load(request.param.read_text()))


def test_is_what_ray_up_takes_and_opens_nothing(prepared: dict[str, Any]) -> None:
    starts = [*prepared["head_start_ray_commands"], *prepared["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    (head,) = [command for command in prepared["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in head
    assert prepared["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert set(prepared["rsync_exclude"]) == NOT_UPLOADED


@CLOUDS
def test_workers_come_and_go_and_spot_has_a_fallback(prepared: dict[str, Any]) -> None:
    kinds = prepared["available_node_types"]
    assert all(kind["min_workers"] == 0 for kind in kinds.values())
    assert kinds["gpu_spot"]["resources"] == kinds["gpu_on_demand"]["resources"]
    assert "GPU" not in kinds[prepared["head_node_type"]]["resources"]


@CLOUDS
@pytest.mark.parametrize(("refused", "started"), [({}, "gpu_spot"), ({"gpu_spot": 0.0}, "gpu_on_demand")])
def test_spot_machines_are_tried_first(prepared: dict[str, Any], refused: dict[str, float], started: str) -> None:
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount

    config = AutoscalingConfig(prepared, skip_content_hash=True)
    asked = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=[ResourceRequestByCount(request=ResourceRequestUtil.make({"CPU": 7.5, "GPU": 1}), count=3)],
        recoverable_resource_availabilities=refused,
    )
    (launch,) = ResourceDemandScheduler().schedule(asked).to_launch
    assert (launch.instance_type, launch.count) == (started, 3)


def test_aws_starts_every_kind_of_node_with_its_image_and_credentials(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray puts the key pair that it makes
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    import boto3
    from moto import mock_aws
    from moto.backends import get_backend
    from moto.core import DEFAULT_ACCOUNT_ID

    cloud = mock_aws(config={"iam": {"load_aws_managed_policies": True}})
    cloud.start(reset=False)  # what other tests keep in this cloud's buckets stays
    get_backend("iam")[DEFAULT_ACCOUNT_ID].reset()  # only this: every backend of a kind resets all kinds, buckets too
    with contextlib.ExitStack() as end:
        end.callback(cloud.stop, remove_data=False)
        from ray.autoscaler._private.aws import config as aws
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

        made = aws.bootstrap_aws(prepare(yaml.safe_load(FILES[0].read_text())))
        workers = (ROOT / "configs" / "cluster" / "aws_workers.json").read_text()
        boto3.client("iam").put_role_policy(RoleName="ray-autoscaler-v1", PolicyName="workers", PolicyDocument=workers)
        rules = aws._create_default_inbound_rules(["sg-1"], made["provider"]["security_group"].get("IpPermissions"))
        assert all(rules.count(rule) == 1 for rule in rules), "EC2 refuses a rule that is given twice"
        (group,) = boto3.resource("ec2").security_groups.filter(GroupNames=["rayjobs"])
        assert {rule.get("FromPort") for rule in group.ip_permissions if rule["IpRanges"]} == {22}

        group.revoke_ingress(CidrIp="0.0.0.0/0", IpProtocol="tcp", FromPort=22, ToPort=22)
        group.authorize_ingress(CidrIp="203.0.113.7/32", IpProtocol="tcp", FromPort=22, ToPort=22)
        aws.bootstrap_aws(prepare(yaml.safe_load(FILES[0].read_text())))
        group.reload()
        open_to = [ip["CidrIp"] for rule in group.ip_permissions for ip in rule["IpRanges"]]
        assert open_to == ["203.0.113.7/32"], "what was narrowed stays so"

        provider = AWSNodeProvider(made["provider"], made["cluster_name"])
        for name, kind in made["available_node_types"].items():
            extra = made["head_node"] if name == "head" else {}
            (started,) = provider.create_node({**kind["node_config"], **extra}, {}, 1).values()
            assert "base-oss-nvidia-driver-gpu" in started.image_id
            assert started.iam_instance_profile["Arn"].endswith("/ray-autoscaler-v1")
            assert (started.instance_lifecycle == "spot") == (name == "gpu_spot")


def test_the_folder_that_the_document_mounts_is_what_ray_up_takes() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
    added = yaml.safe_load(block)
    given = yaml.safe_load(FILES[0].read_text())
    given["initialization_commands"] += added.pop("initialization_commands")
    given["docker"]["run_options"] += added.pop("docker")["run_options"]
    assert not added
    made = prepare(given)
    (folder,) = re.findall(r"--volume (\S+):\1$", "\n".join(made["docker"]["run_options"]), re.MULTILINE)
    assert f"sudo chmod 1777 {folder}" in made["initialization_commands"], "the container has a user of its own"


@pytest.mark.parametrize("folder", ["shipped", "full"])
def test_what_is_uploaded_is_the_code(folder: str, tmp_path: Path) -> None:
    """Packed by what `ray job submit --working-dir .` packs with."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    shown = ROOT
    if folder == "full":
        shown = tmp_path / "project"
        for name in (*NOT_UPLOADED, "adapter"):
            (shown / name).mkdir(parents=True)
            (shown / name / "file").touch()
        shutil.copy(ROOT / ".gitignore", shown)
    packed = tmp_path / "packed.zip"
    create_package(str(shown), packed, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    tops = {Path(name).parts[0] for name in zipfile.ZipFile(packed).namelist()}
    assert "adapter" in tops
    assert not tops & NOT_UPLOADED
    assert packed.stat().st_size < 5e6


def test_the_image_is_the_ray_that_was_tested() -> None:
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    version = pinned.removeprefix("ray==")
    for name in ("cluster.yaml", "configs/cluster/gcp.yaml", "configs/cluster/kuberay.yaml", "Dockerfile"):
        assert version in (ROOT / name).read_text(), name
    ignored = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().split()}
    assert ignored >= NOT_UPLOADED


def test_the_images_drivers_are_new_enough_for_the_pinned_pytorch() -> None:
    pinned = (ROOT / "constraints.txt").read_text()
    needed = {"12": 525, "13": 580}[max(re.findall(r"^nvidia-nccl-cu(\d+)==", pinned, re.MULTILINE))]
    told = {
        path.stem: " ".join(path.read_text().replace("#", "").split())
        for path in (ROOT / "configs" / "cluster").glob("*.yaml")
    }
    told["aws"] = FILES[0].read_text()
    assert {name for name, text in told.items() if f"driver of {needed} or newer" in text} == {"aws", "gcp", "kuberay"}
    (driver,) = re.findall(r"sourceImage: .*-nvidia-(\d+)\n", FILES[2].read_text())
    assert int(driver) >= needed


def test_google_gives_every_machine_a_disk_of_a_kind_and_zone_that_it_takes() -> None:
    google = yaml.safe_load(FILES[2].read_text())
    for kind in google["available_node_types"].values():
        (disk,) = kind["node_config"]["disks"]
        zone = google["provider"]["availability_zone"]
        assert disk["initializeParams"]["diskType"] == f"zones/{zone}/diskTypes/pd-balanced"
    (email,) = {
        account["email"]
        for kind in ("gpu_spot", "gpu_on_demand")
        for account in google["available_node_types"][kind]["node_config"]["serviceAccounts"]
    }
    assert email == f"ray-autoscaler-sa-v1@{google['provider']['project_id']}.iam.gserviceaccount.com"


def test_the_kubernetes_file_has_the_fields_of_a_ray_job() -> None:
    job = yaml.safe_load((ROOT / "configs" / "cluster" / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job["spec"]) <= {
        "entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec",
    }  # fmt: skip
    cluster = job["spec"]["rayClusterSpec"]
    assert set(cluster) <= {
        "rayVersion", "authOptions", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs",
    }  # fmt: skip
    assert cluster["authOptions"] == {"mode": "token"}, "its dashboard listens on the whole network"
    assert set(cluster["headGroupSpec"]) <= {"rayStartParams", "template"}
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert set(pod) <= {"securityContext", "containers", "volumes"}
        (container,) = pod["containers"]
        assert set(container) <= {"name", "image", "env", "resources", "volumeMounts"}
        assert all(isinstance(variable["value"], str) for variable in container.get("env", []))
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert all(isinstance(value, str) for value in container["resources"]["limits"].values())
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_kubernetes_job_asks_for_the_gpus_of_its_workers() -> None:
    """None is there when it starts, and what may come is known to the operator alone."""
    job = yaml.safe_load((ROOT / "configs" / "cluster" / "kuberay.yaml").read_text())
    _, _, _, _, _, config, *overrides = shlex.split(job["spec"]["entrypoint"])
    settings = load(adapter_train.Config, ROOT / config, overrides)
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    assert settings.scale.gpus_per_worker == int(worker["resources"]["limits"]["nvidia.com/gpu"])
    assert settings.scale.workers.max <= group["maxReplicas"]


def asked_for(*overrides: str, verbose: bool = False) -> list[str]:
    config = str(ROOT / "configs" / "adapter" / "alpaca_7b.yaml")
    overrides = ("base.path=s3://bucket/llama", "data.path=[/mnt/alpaca.json]", *overrides)
    return job_command("adapter-train", adapter_train.Config, config, overrides, verbose=verbose)


def test_the_command_for_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    command = asked_for("run.storage=/mnt/runs", verbose=True)
    assert command == [
        "python", "-m", "rayjobs", "adapter-train", "--config", "configs/adapter/alpaca_7b.yaml",
        "base.path=s3://bucket/llama", "data.path=[/mnt/alpaca.json]", "run.storage=/mnt/runs", "--verbose",
    ]  # fmt: skip
    same = "ray job submit --working-dir . -- python -m rayjobs adapter-train"
    assert ray_submit_command(command).startswith(f"RAY_AUTH_MODE=disabled RAY_ADDRESS=http://127.0.0.1:8265 {same}")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch()
    monkeypatch.setenv("RAY_ADDRESS", "http://10.0.0.1:8265")
    assert ray_submit_command(command).startswith(f"RAY_AUTH_MODE=token RAY_ADDRESS=http://10.0.0.1:8265 {same}")


@pytest.mark.parametrize("given", ["run.storage=runs", "", "run.storage=s3://bucket/runs run.cache=cache"])
def test_what_would_go_with_the_job_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=r"run\.(storage|cache) is (runs|cache), which on a cluster"):
        asked_for(*given.split())
    assert asked_for("run.storage=s3://bucket/runs")
    monkeypatch.chdir(ROOT / "docs")
    with pytest.raises(ValueError, match="is not below"):
        asked_for("run.storage=/mnt/runs")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("base.path=weights/llama-7b", "base.path is weights/llama-7b, which is not uploaded, because git ignores"),
        ("data.path=[/mnt/a.json,data/b.json]", "data.path is data/b.json, which is not uploaded, because git ignores"),
        ("base.tokenizer=..", "base.tokenizer is .., which is not uploaded, because git ignores it or it is not below"),
    ],
)
def test_a_path_that_is_not_uploaded_is_refused(given: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=told):
        asked_for("run.storage=/mnt/runs", given)
