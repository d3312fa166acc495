"""One model on a GPU: this process's own, or a worker's on a cluster, whose jobs start on a head that has none."""

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.cluster.ray_init import connect

Model = TypeVar("Model")


def on_gpu(make: Callable[[str], Model]) -> Model:
    """`make(device)`, or what calls its methods in an actor, where this process has no GPU and its cluster has some.

    `make` is pickled then, and an iterator that a method returns comes as a list.
    """
    if torch.cuda.is_available() or "RAY_ADDRESS" not in os.environ:
        return make(_device())
    connect()
    import ray

    from rayjobs.cluster.capacity import cluster_capacity

    have = cluster_capacity()
    if not have.total("GPU"):
        if not have.known:
            told = "no GPU is there, and what may come cannot be seen: the model runs on this machine's CPU"
            print(f"{told}; to have it on a GPU, bring a machine with one up first", file=sys.stderr, flush=True)
        return make(_device())
    holder = ray.remote(ModelActor).options(num_cpus=1, num_gpus=1).remote()
    with reraise_user_errors():
        ray.get(holder.hold.remote(make))
    elsewhere: Any = RemoteModel(holder)
    return elsewhere


class ModelActor:
    """An actor that holds the model."""

    def hold(self, make: Callable[[str], Any]) -> None:
        self.model = make(_device())

    def call(self, method: str, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        found = getattr(self.model, method)(*given, **named)
        return list(found) if isinstance(found, Iterator) else found


class RemoteModel:
    """Has the methods of the model that its actor holds."""

    def __init__(self, holder: Any) -> None:
        self._holder = holder

    def __getattr__(self, method: str) -> Callable[..., Any]:
        import ray

        def called(*given: Any, **named: Any) -> Any:
            with reraise_user_errors():
                return ray.get(self._holder.call.remote(method, given, named))

        return called


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_device() -> str:
    """Where this process alone would put a model."""
    return "cuda" if torch.cuda.is_available() else "cpu"
