"""The demo's images and tiny models: made once, with progress, as folders that the ordinary jobs read.

The models are trained at the same time, as Ray tasks of one thread each, and written in the formats of open_clip, timm
and Hugging Face. The jobs read them as they read full-size models.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rayjobs.cluster.capacity import cluster_capacity
from rayjobs.cluster.device import worker_device
from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.cluster.ray_init import connect
from rayjobs.config import to_dict
from rayjobs.console import Progress
from rayjobs.demo.cache_dir import cache_folder, torch_threads
from rayjobs.demo.captions import descriptions
from rayjobs.demo.clip import train_clip
from rayjobs.demo.config import WorldConfig
from rayjobs.demo.digits import write_digits
from rayjobs.demo.dino import train_dino
from rayjobs.demo.llama import train_llama, training_documents
from rayjobs.demo.stroke_digits import write_drawings
from rayjobs.storage.files import atomic_folder


class World(NamedTuple):
    """The demo's folders."""

    digits: Path
    """`split.json`, its images, and `prompts.json`"""
    clip: Path
    """the tiny CLIP, in open_clip's format"""
    dino: Path
    """the tiny DINO, in timm's format"""
    generated_images: Path
    """a folder of images for each digit"""
    notes: Path
    """the tiny LLaMA that copies notes, in Hugging Face's format"""
    questions: Path
    """the tiny LLaMA that answers questions, in Hugging Face's format"""


class Training(NamedTuple):
    """A model to train."""

    folder: Path
    steps: int
    train: Callable[[Path, str], Iterator[float]]
    """(folder, device) → the loss of every step"""


def cluster_gpus() -> int:
    """The number of GPUs of the cluster; connects to it."""
    connect()
    return int(cluster_capacity().total("GPU"))


def gpu_share(gpus: int, tasks: int) -> float:
    """GPUs for each of some tasks that run at the same time: one each, or an equal share of all."""
    return min(1.0, gpus / tasks)


def worker_count(gpus: int, wanted: int) -> int:
    """Training workers: as many as wanted, but with GPUs at most one for each GPU."""
    return min(wanted, gpus) or wanted


def world_paths(cache: Path, settings: WorldConfig) -> World:
    """The folders for these settings, whether they exist or not."""
    return World(
        digits=cache_folder(cache, "digits", to_dict(settings.digits)),
        clip=cache_folder(cache, "clip", to_dict(settings.clip), descriptions()),
        dino=cache_folder(cache, "dino", to_dict(settings.dino), to_dict(settings.digits)),
        generated_images=cache_folder(cache, "drawn", settings.drawings, settings.digits.seed),
        notes=cache_folder(cache, "llama", to_dict(settings.notes), training_documents(settings.notes)),
        questions=cache_folder(cache, "llama", to_dict(settings.questions), training_documents(settings.questions)),
    )


def make_world(world: World, settings: WorldConfig, *, notes: bool = True) -> None:
    """Make the folders that do not exist; notes: whether the LLaMA that copies notes is wanted."""
    if not world.digits.exists():
        with atomic_folder(world.digits) as new:
            write_digits(settings.digits, new)
    clip, dino, questions = settings.clip, settings.dino, settings.questions
    models = {  # the longest training first
        "LLaMA for questions": Training(world.questions, questions.steps, partial(train_llama, questions)),
        "CLIP": Training(world.clip, clip.steps, partial(train_clip, clip)),
        "DINO": Training(world.dino, dino.steps, partial(train_dino, dino, settings.digits)),
    }
    if notes:
        models["LLaMA for notes"] = Training(world.notes, settings.notes.steps, partial(train_llama, settings.notes))
    train_models(models)
    if not world.generated_images.exists():
        with atomic_folder(world.generated_images) as new:
            write_drawings(new, settings.drawings, settings.digits.seed)


def train_models(models: Mapping[str, Training]) -> None:
    """Train the models whose folders do not exist, at the same time."""
    missing = {name: model for name, model in models.items() if not model.folder.exists()}
    if not missing:
        return
    share = gpu_share(cluster_gpus(), len(missing))
    import ray

    task = ray.remote(num_cpus=1, num_gpus=share, num_returns="streaming")(train_model)
    running = {task.remote(model, worker_device({"GPU": share})): name for name, model in missing.items()}
    losses: dict[str, list[float]] = {name: [] for name in missing}
    with (
        reraise_user_errors(),
        Progress("tiny models", unit="steps", total=sum(model.steps for model in missing.values())) as bar,
    ):
        while running:
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            name = running[ready]
            try:
                losses[name].append(ray.get(next(ready)))
            except StopIteration:
                del running[ready]
            latest = ", ".join(f"{name} loss {of_model[-1]:.2f}" for name, of_model in losses.items() if of_model)
            bar.update(sum(map(len, losses.values())), latest)


def train_model(model: Training, device: str = "cpu") -> Iterator[Any]:
    """Train one model into its folder; yield the loss of every step."""
    with atomic_folder(model.folder) as new, torch_threads(1):
        yield from model.train(new, device)
