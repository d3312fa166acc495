"""The application on Ray Serve: replicas, each with the base and an engine of its own, behind one HTTP address."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayjobs.cluster.device import worker_device
from rayjobs.cluster.ray_workarounds import serve_address
from rayjobs.config import load, to_dict
from rayjobs.config_fields import config_fields
from rayjobs.console import verbose
from rayjobs.errors import DataError, ResourceError
from rayjobs.models.image_conditioning import ImageConditioning, ImageFeaturizer
from rayjobs.serve.kernel_caches import limit_kernel_caches
from rayjobs.serve.settings import ServedConfig, ServerConfig

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from torch import Tensor

    from rayjobs.serve.image_input import ImageLimits
    from rayjobs.serve.metrics import Metrics
    from rayjobs.serve.replicas import Replicas
    from rayjobs.serve.text_model import TextModel

APPLICATION = "rayjobs"
"""Name of the application in Ray Serve."""
LOGGING: dict[str, Any] = {"log_level": "WARNING", "enable_access_log": False}
"""Ray Serve's `LoggingConfig`: no line for each request."""
SPARE_REQUESTS = 16
"""Requests beyond the limit that a replica is given, so that it answers them with 429, and `/health` and the other
replicas at all times."""


class Replica:
    """One replica: an application with its model, which Ray Serve calls."""

    def __init__(self, settings: ServedConfig, device: str, token_sha256: str | None, started: int) -> None:
        """started: time of the server's start, in seconds since 1970, the same for all replicas."""
        from rayjobs.serve.metrics import Metrics
        from rayjobs.serve.replicas import OneReplica

        self._settings, self._device = settings, device
        self._token_sha256, self._started = token_sha256, started
        self._model, self._metrics = load_text_model(settings, device), Metrics()
        self._alone = OneReplica(self._model, self._metrics)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        from rayjobs.serve.replicas import AllReplicas

        application = build_application(
            self._settings,
            self._model,
            self._device,
            token_sha256=self._token_sha256,
            metrics=self._metrics,
            replicas=AllReplicas(self._alone) if self._settings.replicas.several else self._alone,
            started=self._started,
        )
        return with_disconnects(application)

    async def call_alone(self, name: str, *arguments: Any) -> tuple[str, Any]:
        """Call a method of this replica's `OneReplica`. Returns the replica's id and the result."""
        from ray import serve

        return serve.get_replica_context().replica_tag, await getattr(self._alone, name)(*arguments)

    def check_health(self) -> None:
        """Raise RuntimeError if the engine has stopped: Ray Serve then starts another replica in place of this one."""
        if not self._model.worker.healthy:
            raise RuntimeError(f"the engine has stopped: {self._model.worker.error!r}")


def with_disconnects(application: ASGIApp) -> ASGIApp:
    """An application that is told of clients that leave as ASGI has it.

    Ray Serve raises an error instead if a client leaves while a message of its body is waited for.
    """
    from ray.exceptions import TaskCancelledError

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_or_learn() -> Message:
            try:
                return await receive()
            except TaskCancelledError:
                return {"type": "http.disconnect"}

        await application(scope, receive_or_learn, send)

    return call


def load_text_model(settings: ServedConfig, device: str) -> TextModel:
    """Load the base, find its adapters, and start the engine. Raises what `BaseModelConfig.load` raises."""
    from rayjobs.serve.text_model import TextModel

    limit_kernel_caches()
    conditioning = settings.vision.open() if settings.vision else None
    reader = ImageReader(settings, conditioning, device) if conditioning else None
    return TextModel(
        settings.base.load(None, device),
        name=settings.base_name,
        adapters=settings.adapters,
        engine=settings.engine,
        limits=settings.limits,
        read_image=None if reader is None else reader.read,
        encoder=None if conditioning is None else conditioning.encoder.identity,
    )


def build_application(
    settings: ServedConfig,
    model: TextModel,
    device: str,
    *,
    token_sha256: str | None = None,
    metrics: Metrics | None = None,
    replicas: Replicas | None = None,
    started: int | None = None,
) -> ASGIApp:
    """The application of a model, with the page and, if there are caches, the endpoint of images.

    token_sha256, metrics, replicas, started: as in `create_app`.
    """
    from rayjobs.serve.app import create_app
    from rayjobs.serve.classification import ClassificationWorker
    from rayjobs.serve.classifiers import ClassifierFolder
    from rayjobs.serve.images import ImageRoutes
    from rayjobs.serve.static_page import page_routes

    routes = list(page_routes())
    caches = settings.caches
    if caches.folder is not None:
        worker = ClassificationWorker(ClassifierFolder(caches.folder, encoders=caches.encoders, device=device))
        routes += ImageRoutes(worker, image_limits(settings)).routes()
    return create_app(
        model, routes=routes, token_sha256=token_sha256, metrics=metrics, replicas=replicas, started=started
    )


def image_limits(settings: ServedConfig) -> ImageLimits:
    """The largest images that are taken, for classification and in conversations."""
    from rayjobs.serve.image_input import ImageLimits

    return ImageLimits(bytes=settings.caches.image_bytes, pixels=settings.caches.image_pixels)


class ImageReader:
    """Turns the images of conversations into features."""

    def __init__(self, settings: ServedConfig, conditioning: ImageConditioning, device: str) -> None:
        self._limits = image_limits(settings)
        self._preprocess = conditioning.encoder.preprocess
        self._featurizer = ImageFeaturizer(conditioning.encoder, device)
        self._lock = threading.Lock()

    def read(self, url: str) -> Tensor:
        """The features (F,) of the image in a data URL. Raises ApiError for what is no image or too large a one."""
        from rayjobs.serve.image_input import decode_text

        with self._lock:  # one at a time: decoded images are large
            pixels = self._preprocess(decode_text(url, self._limits, "messages"))
            return self._featurizer.features([pixels.numpy().tobytes()])[0]


def bind(settings: ServedConfig, gpus: float) -> Any:
    """The Serve application of some settings, whose replicas reserve this many GPUs each.

    Raises ConfigError if the server's address needs a token and the environment has none.
    """
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from rayjobs.serve.router import EvenRouter

    replicas, limits = settings.replicas, settings.limits
    scale: dict[str, Any] = {"num_replicas": replicas.number}
    if replicas.autoscaling is not None:
        scale = {"autoscaling_config": replicas.autoscaling}
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="replica",
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": gpus},
        max_ongoing_requests=limits.requests + SPARE_REQUESTS,
        max_queued_requests=limits.requests,
        request_router_config=RequestRouterConfig(request_router_class=EvenRouter),
        **scale,
    )
    return deployment.bind(settings, worker_device({"GPU": gpus}), settings.server.token_sha256(), int(time.time()))


def build_app(arguments: Mapping[str, Any]) -> Any:
    """The Serve application of a config file, for `serve deploy`: the arguments are the settings as plain values.

    Raises ResourceError if Ray Serve listens elsewhere than at the address of the settings.
    """
    import ray

    settings = load(ServedConfig, dict(arguments))
    if ray.is_initialized():
        _check_address(settings.server)
    return bind(settings, settings.replicas.gpus or 0.0)


def serve_config(settings: ServedConfig) -> dict[str, Any]:
    """Ray Serve's config file of some settings, as plain values. It holds no token."""
    values = to_dict(settings)
    arguments = {name: values[name] for name in config_fields(ServedConfig)}  # without what a job adds
    arguments["replicas"]["gpus"] = settings.replicas.gpus or 0.0
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": settings.server.host, "port": settings.server.port},
        "logging_config": LOGGING,
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": f"{__name__}:{build_app.__name__}",
                "args": arguments,
            }
        ],
    }


@contextmanager
def serving(settings: ServedConfig, gpus: float) -> Iterator[None]:
    """Serve on the connected cluster while the block runs, which begins once the server answers.

    At the end, after the requests that are being answered, Ray Serve is shut down if it was started here; otherwise
    only the application is deleted, if it was deployed here.

    Raises ResourceError if Ray Serve already runs at another address, or with this application, and RuntimeError if the
    replicas cannot be started, with the traceback of one of them in the message.
    """
    from ray import serve
    from ray.serve.schema import LoggingConfig

    quiet = LoggingConfig(**LOGGING)
    logging.getLogger("ray.serve").setLevel(logging.INFO if verbose() else logging.ERROR)
    ours, deployed = serve_address() is None, False
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": settings.server.host, "port": settings.server.port},
            logging_config=quiet,
        )
        _check_running(settings.server)
        application = bind(settings, gpus)
        deployed = True
        serve.run(application, name=APPLICATION, route_prefix="/", logging_config=quiet)
        yield
    finally:
        if ours:
            serve.shutdown()
        elif deployed:
            serve.delete(APPLICATION)


def _check_running(wanted: ServerConfig) -> None:
    """Raise ResourceError if Ray Serve listens elsewhere than it should, or has the application already."""
    from ray import serve

    if serve_address() is None:
        raise ResourceError("Ray Serve has ended just after its start: somebody else may have ended it; start it again")
    _check_address(wanted)
    if APPLICATION in serve.status().applications:
        raise ResourceError(f"Ray Serve already runs the application {APPLICATION} on this cluster: end it there first")


def _check_address(wanted: ServerConfig) -> None:
    """Raise ResourceError if Ray Serve listens elsewhere than it should, where others may reach it without a token."""
    address = serve_address()
    if address not in (None, (wanted.host, wanted.port)):
        host, port = address
        raise ResourceError(
            f"Ray Serve already runs on this cluster at {host}:{port}, not at server.host={wanted.host} "
            f"server.port={wanted.port}: set these to its address, or end it with serve shutdown"
        )


def check_folders(settings: ServedConfig) -> dict[str, str]:
    """The folders that are served, by their settings. Raises DataError for one that is not there."""
    folders = {"adapters.folder": settings.adapters.folder, "caches.folder": settings.caches.folder}
    given = {name: folder for name, folder in folders.items() if folder is not None}
    for name, folder in given.items():
        if not Path(folder).is_dir():
            raise DataError(f"{name}: there is no folder {folder}; name the folder of your runs, such as runs/")
    return given
