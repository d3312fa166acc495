"""The demo's images and its tiny encoders, made once, with progress, as folders that the ordinary jobs read.

The encoders are trained side by side as Ray tasks of one thread each. They stand in for real ones: folders in
open_clip's and timm's formats, of which the jobs know nothing but the path.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from rayjobs.config import config, to_dict
from rayjobs.demo.captions import sentences
from rayjobs.demo.clip import ClipStandIn, train_clip
from rayjobs.demo.digits import DigitsConfig, write_digits
from rayjobs.demo.dino import DinoStandIn, train_dino
from rayjobs.demo.kept import kept, threads, unfinished
from rayjobs.demo.pen import write_drawings
from rayjobs.runtime import Progress, connect, unwrapped


@config
class WorldConfig:
    """The images and the encoders."""

    digits: DigitsConfig = DigitsConfig()
    clip: ClipStandIn = ClipStandIn()
    dino: DinoStandIn = DinoStandIn()
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


class Training(NamedTuple):
    """A model to train: where it is kept, in how many steps, and how, yielding each step's loss."""

    folder: Path
    steps: int
    train: Callable[[Path], Iterator[float]]


def make_world(settings: WorldConfig, cache: Path) -> World:
    """Everything that the cache does not hold is made; what it holds stays as it is."""
    digits = kept(cache, "digits", to_dict(settings.digits))
    if not digits.exists():
        with unfinished(digits) as new:
            write_digits(settings.digits, new)
    clip = kept(cache, "clip", to_dict(settings.clip), sentences())
    dino = kept(cache, "dino", to_dict(settings.dino), to_dict(settings.digits))
    train_all(
        {
            "CLIP": Training(clip, settings.clip.steps, lambda folder: train_clip(settings.clip, folder)),
            "DINO": Training(dino, settings.dino.steps, lambda new: train_dino(settings.dino, settings.digits, new)),
        }
    )
    drawn = kept(cache, "drawn", settings.drawings, settings.digits.seed)
    if not drawn.exists():
        with unfinished(drawn) as new:
            write_drawings(new, settings.drawings, settings.digits.seed)
    return World(digits, clip, dino, drawn)


def train_all(models: Mapping[str, Training]) -> None:
    """Trains what is not there yet, all at once on the cluster."""
    wanted = {name: model for name, model in models.items() if not model.folder.exists()}
    if not wanted:
        return
    connect()
    import ray

    task = ray.remote(num_cpus=1, num_returns="streaming")(trained)
    running = {task.remote(model): name for name, model in wanted.items()}
    losses: dict[str, list[float]] = {name: [] for name in wanted}
    with unwrapped(), Progress(f"tiny {' and '.join(wanted)}", unit="%", total=100) as bar:
        while running:
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            name = running[ready]
            try:
                losses[name].append(ray.get(next(ready)))
            except StopIteration:
                del running[ready]
            slowest = min(len(losses[name]) / model.steps for name, model in wanted.items())
            bar.update(int(100 * slowest), ", ".join(f"{n} loss {seen[-1]:.2f}" for n, seen in losses.items() if seen))


def trained(model: Training) -> Iterator[Any]:
    """Trains one model into its folder, yielding each step's loss."""
    with unfinished(model.folder) as new, threads(1):
        yield from model.train(new)
