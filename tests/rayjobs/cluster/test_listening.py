"""What a local cluster listens on, and whom it answers."""

import glob
import ipaddress
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
import torch.distributed as dist

from tests.conftest import ROOT
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.ray

LISTENS = "0A"
"""The state of a listening socket in /proc/net/tcp."""


def listening(processes: Iterable[psutil.Process]) -> dict[str, set[str]]:
    """The addresses that these processes accept connections at, with the names of those processes."""
    owners = {}
    for process in processes:
        for file in glob.glob(f"/proc/{process.pid}/fd/*"):
            with suppress(FileNotFoundError, psutil.NoSuchProcess):  # it may end, or close a file, in the meantime
                owners[os.readlink(file)] = process.name()
    found: dict[str, set[str]] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTENS and (owner := owners.get(f"socket:[{inode}]")):
                found.setdefault(parse_address(local.partition(":")[0]), set()).add(owner)
    return found


def parse_address(digits: str) -> str:
    """An address as the kernel writes it: words of four bytes, each in the machine's order."""
    words = [bytes.fromhex(digits[i : i + 8]) for i in range(0, len(digits), 8)]
    address = ipaddress.ip_address(b"".join(word[::-1] if sys.byteorder == "little" else word for word in words))
    return str(getattr(address, "ipv4_mapped", None) or address)


def test_processes_listen_on_loopback_and_a_training_runs_rendezvous_everywhere(cluster: None) -> None:
    ours = psutil.Process()
    ray.get(ray.put(0))
    found = listening([ours, *ours.children(recursive=True)])
    assert {"gcs_server", "raylet"} <= set.union(*found.values())
    assert all(ipaddress.ip_address(address).is_loopback for address in found), found
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=1, rank=0)
    try:
        open_to_all = {one for one in listening([ours]) if not ipaddress.ip_address(one).is_loopback}
    finally:
        dist.destroy_process_group()
    assert len(open_to_all) == 1, "PyTorch's store, as docs/cluster.md says"
    documented = (ROOT / "docs" / "cluster.md").read_text()
    assert re.search(r"PyTorch's store .*listens on every interface", " ".join(documented.split()))


ASK = """
import sys
from ray._raylet import GcsClient
print(len(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None)))
"""


@pytest.mark.slow
def test_a_local_cluster_answers_only_who_has_its_token(cluster: None) -> None:
    address = ray.get_runtime_context().gcs_address

    def ask(**variables: str) -> str:
        command = [sys.executable, "-c", ASK, address]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
        asked = subprocess.run(
            command, env=environment | variables, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        return asked.stdout if asked.returncode == 0 else asked.stderr

    token = os.environ["RAY_AUTH_TOKEN"]
    assert int(ask(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)) > 0
    assert "nauthenticated" in ask(RAY_AUTH_MODE="disabled")
    assert "nauthenticated" in ask(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
