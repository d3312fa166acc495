"""The demo's images and its tiny models, made once, with progress, as folders that the ordinary jobs read.

The models are trained side by side as Ray tasks of one thread each. They stand in for real ones: folders in the formats
of open_clip, timm and Hugging Face, of which the jobs know nothing but the path.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.config import config, to_dict
from rayjobs.console import Progress
from rayjobs.demo.cache_dir import kept, threads
from rayjobs.demo.captions import sentences
from rayjobs.demo.clip import ClipStandIn, train_clip
from rayjobs.demo.digits import DigitsConfig, write_digits
from rayjobs.demo.dino import DinoStandIn, train_dino
from rayjobs.demo.gpus import gpus, share
from rayjobs.demo.llama import LlamaStandIn, documents, train_llama
from rayjobs.demo.stroke_digits import write_drawings
from rayjobs.storage.files import atomic_folder


@config
class WorldConfig:
    """The images and the models."""

    digits: DigitsConfig = DigitsConfig()
    clip: ClipStandIn = ClipStandIn()
    dino: DinoStandIn = DinoStandIn()
    notes: LlamaStandIn = LlamaStandIn()
    questions: LlamaStandIn = LlamaStandIn(
        reads="questions", vocab_size=384, steps=1000, answer_weight=100, init_std=1.5
    )
    drawings: int = Field(default=16, ge=1)
    """Pictures that the pen writes of each digit."""


class World(NamedTuple):
    """Folders by what they hold."""

    digits: Path
    """`split.json`, its images, and `prompts.json`"""
    clip: Path
    """of the tiny CLIP, in open_clip's format"""
    dino: Path
    """of the tiny DINO, in timm's"""
    drawn: Path
    """what the pen wrote, a folder per digit"""
    notes: Path
    """of the tiny LLaMA that copies notes, in Hugging Face's"""
    questions: Path
    """of the tiny LLaMA that answers questions"""


class Training(NamedTuple):
    """A model to train: where it is kept, in how many steps, and how, yielding each step's loss."""

    folder: Path
    steps: int
    train: Callable[[Path, str], Iterator[float]]
    """(folder, device) → losses"""


def world_in(cache: Path, settings: WorldConfig) -> World:
    """Where the world of these settings is kept, made or not."""
    return World(
        digits=kept(cache, "digits", to_dict(settings.digits)),
        clip=kept(cache, "clip", to_dict(settings.clip), sentences()),
        dino=kept(cache, "dino", to_dict(settings.dino), to_dict(settings.digits)),
        drawn=kept(cache, "drawn", settings.drawings, settings.digits.seed),
        notes=kept(cache, "llama", to_dict(settings.notes), documents(settings.notes)),
        questions=kept(cache, "llama", to_dict(settings.questions), documents(settings.questions)),
    )


def make_world(world: World, settings: WorldConfig) -> None:
    """Makes what is not there; what is stays as it is."""
    if not world.digits.exists():
        with atomic_folder(world.digits) as new:
            write_digits(settings.digits, new)
    clip, dino, notes, questions = settings.clip, settings.dino, settings.notes, settings.questions
    train_all(  # the longest first
        {
            "DINO": Training(world.dino, dino.steps, partial(train_dino, dino, settings.digits)),
            "CLIP": Training(world.clip, clip.steps, partial(train_clip, clip)),
            "LLaMA for questions": Training(world.questions, questions.steps, partial(train_llama, questions)),
            "LLaMA for notes": Training(world.notes, notes.steps, partial(train_llama, notes)),
        }
    )
    if not world.drawn.exists():
        with atomic_folder(world.drawn) as new:
            write_drawings(new, settings.drawings, settings.digits.seed)


def train_all(models: Mapping[str, Training]) -> None:
    """Trains what is not there yet, all at once on the cluster."""
    wanted = {name: model for name, model in models.items() if not model.folder.exists()}
    if not wanted:
        return
    gpu = share(gpus(), len(wanted))
    import ray

    task = ray.remote(num_cpus=1, num_gpus=gpu, num_returns="streaming")(trained)
    running = {task.remote(model, "cuda" if gpu else "cpu"): name for name, model in wanted.items()}
    losses: dict[str, list[float]] = {name: [] for name in wanted}
    with (
        reraise_user_errors(),
        Progress("tiny models", unit="steps", total=sum(model.steps for model in wanted.values())) as bar,
    ):
        while running:
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            name = running[ready]
            try:
                losses[name].append(ray.get(next(ready)))
            except StopIteration:
                del running[ready]
            told = ", ".join(f"{name} loss {seen[-1]:.2f}" for name, seen in losses.items() if seen)
            bar.update(sum(map(len, losses.values())), told)


def trained(model: Training, device: str = "cpu") -> Iterator[Any]:
    """Trains one model into its folder, yielding each step's loss."""
    with atomic_folder(model.folder) as new, threads(1):
        yield from model.train(new, device)
