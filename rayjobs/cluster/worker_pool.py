"""Number of worker processes and the resources that each reserves."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rayjobs.cluster.capacity import Capacity, cluster_capacity
from rayjobs.config import config
from rayjobs.errors import ResourceError, UserError

RAY_DATA_CPUS = 0.5
"""CPUs per node left unreserved for Ray Data tasks. If workers reserved every CPU, their data could never be read, and
they would wait forever."""

TASK_CPUS = 0.001
"""CPUs that a task reserves which feeds actors, so that it finds room beside those that hold all whole CPUs."""


@config
class WorkerRange:
    """Bounds of the number of workers. A single number N in a config stands for {min: N, max: N}."""

    min: int = Field(default=1, ge=1)
    """Minimum number of workers, for which the cluster must have room. Training continues with it after losing
    nodes."""
    max: int = 1
    """Maximum number of workers: training grows to it when nodes are added; pools that encode images, generate text or
    run trials have this fixed size."""

    def __post_init__(self) -> None:
        if self.max < self.min:
            raise UserError(f"max is {self.max}, below min, {self.min}")

    def __str__(self) -> str:
        return str(self.max) if self.min == self.max else f"{self.min} to {self.max}"


def _parse_worker_range(workers: Any) -> Any:
    if isinstance(workers, int):
        return WorkerRange(min=workers, max=workers)
    if not isinstance(workers, WorkerRange | dict):
        raise UserError("must be a number, or bounds such as {min: 2, max: 8}")
    return workers


@config
class WorkerPoolConfig:
    """Number of workers and the resources of each."""

    workers: Annotated[WorkerRange, BeforeValidator(_parse_worker_range)] = WorkerRange()
    """Number of workers, or bounds such as {min: 2, max: 8}."""
    cpus_per_worker: float | None = Field(default=None, gt=0)
    """CPUs that each worker reserves. null takes 1, or a fraction of it if the nodes have too few."""
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """GPUs that each worker reserves. null takes 1 if the cluster has any GPU, else 0."""

    def resources(self, *, reserved_cpus: float = RAY_DATA_CPUS) -> dict[str, float]:
        """Return what each worker reserves on the connected cluster, including nodes that its autoscaler may add.

        reserved_cpus: CPUs of each node that workers leave free. Raises ResourceError if `workers.min` can never fit.
        """
        return self.fit(cluster_capacity(), reserved_cpus)

    def fit(self, capacity: Capacity, reserved_cpus: float) -> dict[str, float]:
        """Return what each worker reserves on a cluster of this capacity. See `resources`."""
        fewest, gpus = self.workers.min, self.gpus_per_worker
        if gpus is None:
            if not capacity.is_upper_limit and not capacity.total("GPU"):
                raise ResourceError(
                    "the cluster has no GPU yet, and rayjobs cannot see whether nodes with GPUs may be added: "
                    "set gpus_per_worker; 0 runs on CPUs"
                )
            gpus = 1.0 if capacity.total("GPU") else 0.0
        candidates = [{"CPU": cpus, **({"GPU": gpus} if gpus else {})} for cpus in self._cpu_candidates()]
        for per_worker in candidates:
            if not capacity.is_upper_limit or capacity.max_workers(per_worker, reserved_cpus) >= fewest:
                return per_worker
        each = " and ".join(f"{amount:g} {name}" for name, amount in candidates[0].items())
        reserved = f", of which every node keeps {reserved_cpus:g} CPU for Ray Data" if reserved_cpus else ""
        hint = "; gpus_per_worker=0 runs them on CPUs" if gpus and self.gpus_per_worker is None else ""
        raise ResourceError(
            f"{fewest} worker{'s' * (fewest > 1)} of {each} each can never run: there is room for "
            f"{capacity.max_workers(candidates[0], reserved_cpus)}; the cluster has {capacity}{reserved}{hint}"
        )

    def _cpu_candidates(self) -> tuple[float, ...]:
        """Return powers of two: Ray rounds resources to 1/10,000, so that other fractions do not add up to a CPU."""
        return (self.cpus_per_worker,) if self.cpus_per_worker else (1.0, 0.5, 0.25, 0.125, 0.0625)


def actor_cpus(resources: Mapping[str, float]) -> float:
    """Return the CPUs that an actor of a Ray Data pipeline reserves, slightly fewer than a worker's `resources`.

    Otherwise two jobs on two CPUs would hold one each, and both would wait for the tasks that feed their actors.
    """
    return round(0.98 * resources["CPU"], 4)
