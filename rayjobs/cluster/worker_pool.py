"""The frozen LLaMA that a job names, and what may run copies of it."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rayjobs.cluster.capacity import Capacity, cluster_capacity
from rayjobs.config import config
from rayjobs.errors import UserError

RAY_DATA_CPUS = 0.5
"""Of every node, for Ray Data, which would otherwise wait for ever beside workers that hold all there is."""


@config
class WorkerRange:
    """Processes that hold the model, each on its own device: as many as there is room for, within bounds."""

    min: int = Field(default=1, ge=1)
    """What it takes to start, and to go on when machines are lost; `workers: 8` is short for 8 in both."""
    max: int = 1
    """What it grows to, and grows back to when machines come (again)."""

    def __post_init__(self) -> None:
        if self.max < self.min:
            raise UserError(f"max is {self.max}, below min, {self.min}")

    def __str__(self) -> str:
        return str(self.max) if self.min == self.max else f"{self.min} to {self.max}"


def _both(workers: Any) -> Any:
    if isinstance(workers, int):
        return WorkerRange(min=workers, max=workers)
    if not isinstance(workers, WorkerRange | dict):
        raise UserError("must be a number, or bounds such as {min: 2, max: 8}")
    return workers


@config
class WorkerPoolConfig:
    """How many workers, and what each may use."""

    workers: Annotated[WorkerRange, BeforeValidator(_both)] = WorkerRange()
    cpus_per_worker: float | None = Field(default=None, gt=0)
    """CPUs that a worker reserves; null leaves a share for Ray Data."""
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """GPUs that a worker reserves; null is 1 where the cluster has any, else 0."""

    def resources(self, *, beside: float = RAY_DATA_CPUS) -> dict[str, float]:
        """Per worker, on the cluster as it is or may grow. Raises ValueError at once for what can never fit.

        beside: CPUs of each node that no worker takes.
        """
        return self.fit(cluster_capacity(), beside)

    def fit(self, have: Capacity, beside: float) -> dict[str, float]:
        """`resources` of a cluster that has so much."""
        fewest, gpus = self.workers.min, self.gpus_per_worker
        if gpus is None:
            if not have.known and not have.total("GPU"):
                raise UserError(
                    "no GPU is there yet, and what may come cannot be seen: set gpus_per_worker, 0 for none"
                )
            gpus = 1.0 if have.total("GPU") else 0.0
        tried = [{"CPU": cpus, **({"GPU": gpus} if gpus else {})} for cpus in self._cpus()]
        for worker in tried:
            if not have.known or have.room(worker, beside) >= fewest:
                return worker
        wanted = " and ".join(f"{amount:g} {name}" for name, amount in tried[0].items())
        kept = f", of which every node keeps {beside:g} CPU for Ray Data" if beside else ""
        without = "; gpus_per_worker=0 runs them on CPUs" if gpus and self.gpus_per_worker is None else ""
        raise UserError(
            f"{fewest} worker{'s' * (fewest > 1)} of {wanted} each can never run: there is room for "
            f"{have.room(tried[0], beside)}; the cluster has {have}{kept}{without}"
        )

    def _cpus(self) -> tuple[float, ...]:
        """Powers of two: Ray divides by them, and other fractions do not add up."""
        return (self.cpus_per_worker,) if self.cpus_per_worker else (1.0, 0.5, 0.25, 0.125, 0.0625)
