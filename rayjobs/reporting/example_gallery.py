"""Example images that a run keeps with its predictions: thumbnails, and their captions in `examples.json`."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from cafo.errors import ImageError
from cafo.images import load_image
from rayjobs.storage.files import atomic_path, write_json

EXAMPLES = "examples.json"
ORDER = "mistakes first, then right answers, evenly drawn."
"""The note that says how `mistakes_first` selects."""


def mistakes_first(wrong: Sequence[int], right: Sequence[int], of_each: int = 6) -> list[int]:
    """At most `of_each` of the wrong and then of the right indices, at equal distances."""
    chosen: list[int] = []
    for indices in (wrong, right):
        step = max(1, len(indices) // of_each)
        chosen += indices[::step][:of_each]
    return chosen


def write_examples(folder: Path, examples: Iterable[tuple[Path, str]], note: str) -> None:
    """Write thumbnails with their captions. An image that cannot be read is left out.

    Args:
        examples: (image file, caption) of each.
        note: a sentence about all of them, which the report shows below.
    """
    images = []
    for number, (path, caption) in enumerate(examples):
        file = folder / "examples" / f"{number:02d}.jpg"
        try:
            thumbnail = load_image(path)
        except ImageError:
            continue
        thumbnail.thumbnail((160, 160))
        with atomic_path(file) as temporary:
            thumbnail.save(temporary, format="JPEG")
        images.append({"file": f"examples/{file.name}", "caption": caption})
    write_json(folder / EXAMPLES, {"note": note, "images": images})
