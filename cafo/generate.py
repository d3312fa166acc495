"""Step 2, generate: an image generator draws every class, and CLIP keeps the best K'.

CaFo (arXiv 2303.02151), section 3.2: candidates are drawn for the data set's template, scored by CLIP against the
class's text, and the K' best of each class join the few-shot set.

Output: a folder of images and a list in CoOp's format, `{"train": [[path, label, class name], …]}`, best first within
each class, so that a smaller K' is a prefix; beside it `scores` and `prompts` by path, and the `settings` they belong
to.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from cafo.datasets import IMAGE_SUFFIXES, Item
from cafo.errors import CafoError, ImageError
from cafo.files import as_path, read_json, atomic_path, write_json
from cafo.images import load_image
from cafo.openai_client import Endpoint, RateLimitedClient
from cafo.prompt import with_spaces

if TYPE_CHECKING:  # a protocol alone should not import the towers' libraries
    from cafo.encoders import Encoder

_IMAGES_AT_ONCE = 32
_REFUSALS = (
    "content_policy",
    "content policy",
    "content_filter",
    "contentfilter",
    "content filter",
    "moderation",
    "responsibleai",
    "safety system",
)


class ImageGenerator(Protocol):
    """Whatever can draw a class."""

    def draw(self, class_name: str, prompt: str, n: int, seed: int) -> Iterator[Image.Image | ImageError]:
        """Up to `n` RGB images for the prompt; one that came out unusable is handed on as its error."""


class FolderGenerator:
    """Images drawn before: `<root>/<class name>/*`, with underscores or with spaces, in the order of their names."""

    def __init__(self, root: str | Path) -> None:
        self._root = as_path(root)
        if not self._root.is_dir():
            raise CafoError(f"no folder {root}; give the folder that holds one folder of drawn images per class")

    def draw(self, class_name: str, prompt: str, n: int, seed: int) -> Iterator[Image.Image | ImageError]:
        """The first `n` images of the class's folder."""
        names = dict.fromkeys((class_name, with_spaces(class_name), class_name.replace(" ", "_")))
        folder = next((self._root / name for name in names if (self._root / name).is_dir()), None)
        if folder is None:
            raise CafoError(f"{self._root} has no folder {class_name!r}; there should be one per class")
        for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)[:n]:
            yield _decoded(path, str(path))


class EndpointGenerator:
    """An OpenAI-compatible images endpoint."""

    def __init__(self, endpoint: Endpoint, size: str = "256x256") -> None:
        self._client, self._size = RateLimitedClient(endpoint), size

    def draw(self, class_name: str, prompt: str, n: int, seed: int) -> Iterator[Image.Image | ImageError]:
        """One request per image: not every server draws several, and a refusal or a stop then loses one."""
        for number in range(n):
            try:
                reply = self._client.acquire().images.generate(
                    model=self._client.endpoint.model, prompt=prompt, n=1, size=self._size, response_format="b64_json"
                )
            except Exception as error:
                if not _is_refusal(error):
                    raise
                reason = " ".join(str(error).split())
                yield ImageError(f"{class_name}, image {number}: refused by the endpoint: {reason}")
                continue
            encoded = reply.data[0].b64_json if reply.data else None
            if not encoded:
                yield ImageError(f"{class_name}, image {number}: the endpoint sent no image data")
                continue
            yield _decoded(base64.b64decode(encoded), f"{class_name}, image {number}")


class DiffusersGenerator:
    """A local Stable Diffusion through `diffusers`, an optional extra."""

    def __init__(self, model: str, device: str = "cuda", steps: int = 30) -> None:
        try:
            import diffusers
        except ImportError as error:
            raise CafoError(
                "drawing locally needs the optional `diffusers` package; install the `diffusers` extra"
            ) from error
        # safetensors only: the older pickled weights could run code
        pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(model, use_safetensors=True)
        self._pipeline, self._device, self._steps = pipeline.to(device), device, steps

    def draw(self, class_name: str, prompt: str, n: int, seed: int) -> Iterator[Image.Image | ImageError]:
        """`n` images, each from a seed of its own."""
        for number in range(n):
            generator = torch.Generator(self._device).manual_seed(seed * 1_000_003 + number)
            yield self._pipeline(prompt, num_inference_steps=self._steps, generator=generator).images[0].convert("RGB")


def generate(
    generator: ImageGenerator,
    encoder: Encoder,
    classifier: Tensor,
    class_names: Sequence[str],
    template: str,
    folder: str | Path,
    *,
    list_name: str = "dalle_generated.json",
    candidates: int = 16,
    keep: int = 8,
    seed: int = 0,
    report: Callable[[str, int, list[str]], None] = lambda class_name, kept, rejected: None,
) -> Path:
    """Draw every class, keep the K' best by CLIP, write images and list. Classes already in the list are not drawn
    again.

    Args:
        encoder: CLIP's image tower.
        classifier: W, (C, N): the class texts that candidates are scored against.
        template: one sentence with `{}`.
        candidates: images drawn per class.
        keep: K'.
        report: called after each drawn class with how many were kept and why others could not be used. A class of
            which none could be used is left out of the list, and drawn again by the next call.

    Returns:
        The path of the list.

    Raises:
        ValueError: keep > candidates, or an existing list of other settings.
    """
    if not 1 <= keep <= candidates:
        raise CafoError(f"keep must be from 1 to the {candidates} candidates, got {keep}")
    folder, path = Path(folder), Path(folder) / list_name
    settings = {
        "encoder": encoder.identity,
        "template": template,
        "candidates": candidates,
        "keep": keep,
        "seed": seed,
    }
    empty: dict[str, Any] = {"train": [], "scores": {}, "prompts": {}, "settings": settings}
    known = read_json(path, "") if path.exists() else empty
    if known.get("settings") != settings:
        raise CafoError(
            f"{list_name} was made with other settings ({known.get('settings')}, now {settings}); name another"
        )
    drawn = {entry[1] for entry in known["train"]}
    for label, name in enumerate(class_names):
        if label in drawn:
            continue
        prompt = template.format(with_spaces(name))
        images: list[Image.Image] = []
        rejected: list[str] = []
        for image in generator.draw(name, prompt, candidates, seed + label):
            if isinstance(image, ImageError):
                rejected.append(str(image))
            else:
                images.append(image)
        scores = clip_scores(encoder, images, classifier[:, label])
        best = sorted(range(len(images)), key=lambda i: (-scores[i], i))[:keep]
        for place, i in enumerate(best):
            relative = f"{label:05d}/{place:03d}.png"  # by label: ImageNet has two classes named crane
            with atomic_path(folder / relative) as temporary:
                images[i].save(temporary, "PNG")
            known["train"].append([relative, label, name])
            known["scores"][relative] = scores[i]
            known["prompts"][relative] = prompt
        write_json(path, known)
        report(name, len(best), rejected)
    return path


def clip_scores(encoder: Encoder, images: Sequence[Image.Image], text: Tensor) -> list[float]:
    """Cosine of each image with the class text (C,), in the images' order."""
    if not images:
        return []
    batches = [images[i : i + _IMAGES_AT_ONCE] for i in range(0, len(images), _IMAGES_AT_ONCE)]
    features = [encoder.encode_image(torch.stack([encoder.preprocess(image) for image in b])) for b in batches]
    return (torch.cat(features).cpu() @ text.cpu().float()).tolist()


def best_per_class(items: Sequence[Item], keep: int) -> tuple[Item, ...]:
    """The K' best of each class of a list that `generate` wrote (or the first K' of any other list)."""
    taken: dict[int, int] = {}
    chosen = []
    for item in items:
        taken[item.label] = taken.get(item.label, 0) + 1
        if taken[item.label] <= keep:
            chosen.append(item)
    return tuple(chosen)


def _is_refusal(error: Exception) -> bool:
    """Whether an endpoint refuses a prompt or its image for their content, which servers word differently. Any other
    bad request would be bad for every class."""
    told = f"{getattr(error, 'code', '')} {error}".lower()
    return getattr(error, "status_code", None) == 400 and any(word in told for word in _REFUSALS)


def _decoded(source: Path | bytes, name: str) -> Image.Image | ImageError:
    try:
        return load_image(source, name=name)
    except ImageError as error:
        return error
