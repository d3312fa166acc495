"""Load a model on a GPU, in this process or in an actor.

A job submitted to a cluster runs on the head node, which usually has no GPU. If this process has none but the cluster
has, the model is loaded in an actor on a GPU node and method calls are forwarded to it.
"""

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from rayjobs.cluster.device import default_device
from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.cluster.ray_init import connect

Model = TypeVar("Model")

logger = logging.getLogger(__name__)


def load_on_gpu(load: Callable[[str], Model]) -> Model:
    """Return `load(device)`, or a proxy whose methods run in an actor that has called `load("cuda")`.

    For the actor, `load` is pickled, and a method that returns an iterator returns a list instead. Without any GPU the
    model is loaded in this process, on the CPU.
    """
    if default_device() == "cuda" or "RAY_ADDRESS" not in os.environ:
        return load(default_device())
    connect()
    import ray

    from rayjobs.cluster.capacity import cluster_capacity

    capacity = cluster_capacity()
    if not capacity.total("GPU"):
        if not capacity.is_upper_limit:
            logger.warning(
                "the cluster has no GPU yet, and rayjobs cannot see whether nodes with GPUs may be added: the model "
                "runs on this node's CPU. To run it on a GPU, add a node that has one before starting the job"
            )
        return load(default_device())
    actor = ray.remote(ModelActor).options(num_cpus=1, num_gpus=1).remote()
    with reraise_user_errors():
        ray.get(actor.load.remote(load))
    return cast(Model, RemoteModel(actor))


class ModelActor:
    """The actor that holds the model."""

    def load(self, load: Callable[[str], Any]) -> None:
        self.model = load(default_device())

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = getattr(self.model, method)(*args, **kwargs)
        return list(result) if isinstance(result, Iterator) else result


class RemoteModel:
    """Proxy with the methods of the model that a `ModelActor` holds."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return RemoteMethod(self._actor, method)


class RemoteMethod:
    """One method of a `RemoteModel`: a call waits for the actor's result."""

    def __init__(self, actor: Any, method: str) -> None:
        self._actor, self._method = actor, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import ray

        with reraise_user_errors():
            return ray.get(self._actor.call.remote(self._method, args, kwargs))
