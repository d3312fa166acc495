"""Resources that a cluster has, and that its autoscaler may add."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

from rayjobs.cluster.ray_workarounds import (
    HEAD_RESOURCE,
    autoscaled_by_kubernetes,
    find_autoscaler_config,
    find_kuberay_config,
    resources_of_lost_nodes,
)

Resources = Mapping[str, float]
"""Amounts by resource name, such as {"CPU": 8, "GPU": 1}."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The resources of each node that a job may count on."""

    nodes: tuple[Resources, ...]
    """Nodes that are there and stay."""
    addable: tuple[Resources, ...] = ()
    """Nodes that the autoscaler may start, `max_added` of them at a time."""
    max_added: int = 0
    lost: tuple[Resources, ...] = ()
    """Machines of one's own that were there, are off now, and may come back."""
    is_upper_limit: bool = True
    """True if `nodes`, `addable` and `lost` are all that the cluster can have. False if the autoscaler's configuration
    cannot be read (not on the head node, or not allowed), or while on-premises nodes have not been connected yet."""

    def total(self, resource: str) -> float:
        """Return the largest amount of a resource that the cluster can have."""
        added = sum(self._largest(node.get(resource, 0) for node in self.addable))
        return added + sum(node.get(resource, 0) for node in self.nodes + self.lost)

    def max_workers(self, per_worker: Resources, reserved_cpus: float = 0.0) -> int:
        """Return how many workers can run at once, each on one node, if workers leave `reserved_cpus` of every node."""
        added = sum(self._largest(_max_workers_on(node, per_worker, reserved_cpus) for node in self.addable))
        return int(added + sum(_max_workers_on(node, per_worker, reserved_cpus) for node in self.nodes + self.lost))

    def __str__(self) -> str:
        """Return a phrase such as `2 nodes and up to 8 more, 68 CPU and 8 GPU in all`."""
        nodes = f"{len(self.nodes)} node{'s' * (len(self.nodes) != 1)}"
        if self.addable:
            nodes += f" and up to {min(self.max_added, len(self.addable))} more"
        if self.lost:
            nodes += f" and {len(self.lost)} that {'are' if len(self.lost) > 1 else 'is'} off"
        return f"{nodes}, {self.total('CPU'):g} CPU and {self.total('GPU'):g} GPU in all"

    def _largest(self, values: Iterable[float]) -> list[float]:
        return sorted(values, reverse=True)[: self.max_added]


def cluster_capacity() -> Capacity:
    """Return the capacity of the cluster that this process is connected to."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    heads = [node for node in alive if HEAD_RESOURCE in node["Resources"]]
    present = Capacity(nodes=tuple(node["Resources"] for node in alive))
    context = ray.get_runtime_context()
    config = find_autoscaler_config(context.gcs_address) or find_kuberay_config()
    if config is not None and config["provider"]["type"] == "local":
        return _own_machines(config, present, {node["NodeManagerAddress"] for node in alive})
    if config is not None:
        return autoscaler_capacity(config, [node["Resources"] for node in heads])
    on_head = any(node["NodeID"] == context.get_node_id() for node in heads)
    return replace(present, is_upper_limit=on_head and not autoscaled_by_kubernetes())


def _own_machines(config: Mapping[str, Any], present: Capacity, connected: Set[str]) -> Capacity:
    """The capacity of machines that are named one by one. Those that are off now come with what they had before."""
    named = config["provider"].get("worker_ips", [])[: config["max_workers"]]
    before = resources_of_lost_nodes()
    lost = tuple(before[address] for address in named if address not in connected and address in before)
    return replace(present, lost=lost, is_upper_limit=len(present.nodes) + len(lost) > len(named))


def autoscaler_capacity(config: Mapping[str, Any], head: Iterable[Resources]) -> Capacity:
    """Return the capacity that a cluster file allows, once `ray up` has filled in the resources of its node types."""
    max_workers = config["max_workers"]
    types = [type_ for name, type_ in config["available_node_types"].items() if name != config["head_node_type"]]
    counts = [min(max_workers, type_.get("max_workers", max_workers)) for type_ in types]
    addable = [type_["resources"] for type_, count in zip(types, counts, strict=True) for _ in range(count)]
    return Capacity(nodes=tuple(head), addable=tuple(addable), max_added=max_workers)


def _max_workers_on(node: Resources, per_worker: Resources, reserved_cpus: float) -> int:
    free = {**node, "CPU": max(0.0, node.get("CPU", 0) - reserved_cpus)}
    return min(int(free.get(name, 0) / amount + 1e-6) for name, amount in per_worker.items())
