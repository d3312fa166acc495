"""What a cluster can give: the nodes that are there and those that its autoscaler may still start."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import ray

from rayjobs.storage.yaml_file import read_yaml

Resources = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The nodes that a job may count on."""

    nodes: tuple[Resources, ...]
    """Those that stay."""
    more: tuple[Resources, ...] = ()
    """Those that may come, of which `at_most` are there at once."""
    at_most: int = 0
    known: bool = True
    """Whether this is all; not where an autoscaler's plans cannot be seen, nor while a machine of one's own is off."""

    def total(self, name: str) -> float:
        """All there can be of a resource."""
        return sum(self._best(node.get(name, 0) for node in self.more)) + sum(n.get(name, 0) for n in self.nodes)

    def room(self, worker: Resources, beside: float = 0.0) -> int:
        """How many workers of so much each fit, where every node keeps some CPUs free of them."""
        fit = sum(_fit(node, worker, beside) for node in self.nodes)
        return int(fit + sum(self._best(_fit(node, worker, beside) for node in self.more)))

    def __str__(self) -> str:
        """Such as `2 nodes with 4 CPU and 1 GPU, and up to 8 more, 16 CPU and 2 GPU in all`."""
        told = f"{len(self.nodes)} node{'s' * (len(self.nodes) != 1)}"
        if self.more:
            told += f" and up to {min(self.at_most, len(self.more))} more"
        return f"{told}, {self.total('CPU'):g} CPU and {self.total('GPU'):g} GPU in all"

    def _best(self, values: Iterable[float]) -> list[float]:
        return sorted(values, reverse=True)[: self.at_most]


def cluster_capacity() -> Capacity:
    """Of the cluster that this process is connected to."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    heads = [node for node in alive if "node:__internal_head__" in node["Resources"]]
    everything = Capacity(nodes=tuple(node["Resources"] for node in alive))
    context = ray.get_runtime_context()
    config = _autoscaler_config(context.gcs_address)
    if config is not None and config["provider"]["type"] == "local":
        owned = min(config["max_workers"], len(config["provider"].get("worker_ips", [])))
        return replace(everything, known=len(alive) > owned)
    if config is not None:
        return autoscaler_capacity(config, [node["Resources"] for node in heads])
    # An autoscaler's plans lie on the head; on Kubernetes they are known to Ray's operator alone.
    beside_head = any(node["NodeID"] == context.get_node_id() for node in heads)
    elsewhere = "--no-monitor" in os.environ.get("KUBERAY_GEN_RAY_START_CMD", "")
    return everything if beside_head and not elsewhere else replace(everything, known=False)


def autoscaler_capacity(config: Mapping[str, Any], head: Iterable[Resources]) -> Capacity:
    """What a cluster file, as `ray up` completes it, lets the autoscaler start beside the head."""
    most = config["max_workers"]
    kinds = [kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]]
    more = [kind["resources"] for kind in kinds for _ in range(min(most, kind.get("max_workers", most)))]
    return Capacity(nodes=tuple(head), more=tuple(more), at_most=most)


def _autoscaler_config(gcs_address: str) -> dict[str, Any] | None:
    """The file that this cluster's autoscaler was started with, as on the head of `ray up`, where jobs run."""
    for process in psutil.process_iter(["cmdline"]):
        arguments = dict(part.partition("=")[::2] for part in process.info["cmdline"] or [])
        if arguments.get("--gcs-address") == gcs_address and "--autoscaling-config" in arguments:
            return read_yaml(Path(arguments["--autoscaling-config"]).expanduser())
    return None


def _fit(node: Resources, worker: Resources, beside: float) -> int:
    free = {**node, "CPU": max(0.0, node.get("CPU", 0) - beside)}
    return min(int(free.get(name, 0) / amount + 1e-6) for name, amount in worker.items())
