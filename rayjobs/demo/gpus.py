"""What the demo's parts are given of a cluster's GPUs; where there is none, each computes on CPUs."""

from rayjobs.cluster.capacity import cluster_capacity
from rayjobs.cluster.ray_init import connect


def gpus() -> int:
    """As many as the cluster has."""
    connect()
    return int(cluster_capacity().total("GPU"))


def share(gpus: int, tasks: int) -> float:
    """Of each of some tasks that run side by side: a whole GPU, or an equal part of what there is."""
    return min(1.0, gpus / tasks)


def workers(gpus: int, wanted: int) -> int:
    """Of a training: as many as wanted, but where there are GPUs none without one."""
    return min(wanted, gpus) or wanted
