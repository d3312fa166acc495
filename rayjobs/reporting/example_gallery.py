"""Pictures that a run keeps to show with what was answered: small copies, and captions in `examples.json`."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from cafo.errors import ImageError
from cafo.images import load_image
from rayjobs.storage.files import atomic_path, write_json

EXAMPLES = "examples.json"
ORDER = "mistakes first, then right answers, evenly drawn."


def mistakes_first(wrong: Sequence[int], right: Sequence[int], of_each: int = 6) -> list[int]:
    """Some of each kind, evenly drawn."""
    return [place for places in (wrong, right) for place in places[:: max(1, len(places) // of_each)][:of_each]]


def write_examples(folder: Path, shown: Iterable[tuple[Path, str]], note: str) -> None:
    """Keeps pictures with a caption each, but for files that are no readable image.

    shown: (image file, caption). note: what they are.
    """
    images = []
    for number, (path, caption) in enumerate(shown):
        file = folder / "examples" / f"{number:02d}.jpg"
        try:
            small = load_image(path)
        except ImageError:
            continue
        small.thumbnail((160, 160))
        with atomic_path(file) as temporary:
            small.save(temporary, format="JPEG")
        images.append({"file": f"examples/{file.name}", "caption": caption})
    write_json(folder / EXAMPLES, {"note": note, "images": images})
