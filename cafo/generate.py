"""Step 2, generate: an image generator makes candidates of every class, and CLIP keeps the best K'.

CaFo (arXiv 2303.02151), section 3.2: candidates are generated for the data set's template and scored by CLIP against
the class's text. The K' best of each class join the few-shot set.

Output: a folder of images and a list in CoOp's format, `{"train": [[path, label, class name], …]}`, best first within
each class, so that a smaller K' is a prefix of the list. The list also holds `scores` and `prompts` by path, and the
`settings` that it was made with.

Legend: B images, C width of CLIP's features, N classes.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from cafo.class_folders import is_image_name
from cafo.dataset_layouts import check_templates
from cafo.errors import CafoError, ImageError, refuse_text
from cafo.files import as_path, atomic_path, read_json, write_json
from cafo.images import load_image
from cafo.items import Item
from cafo.openai_client import Endpoint, RateLimitedClient
from cafo.prompt import with_spaces

if TYPE_CHECKING:  # for a protocol only; importing it would import open_clip and timm
    from cafo.encoders import Encoder

_IMAGES_PER_BATCH = 32
_REFUSAL_WORDS = (
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
    """A source of candidate images of a class."""

    def generate(self, class_name: str, prompt: str, n: int, seed: int) -> Iterator[Image.Image | ImageError]:
        """Yield up to `n` RGB images for the prompt; yield an `ImageError` in place of an image that is unusable."""


class FolderGenerator:
    """Images that were generated before: `<root>/<class name>/*`, with underscores or spaces in the class name.

    Raises:
        CafoError: `root` is not a folder.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = as_path(root)
        if not self._root.is_dir():
            raise CafoError(f"no folder {root}; give the folder that holds one folder of generated images per class")

    def generate(self, class_name: str, prompt: str, n: int, seed: int) -> Iterator[Image.Image | ImageError]:
        """Yield the first `n` images of the class's folder, by file name.

        Raises:
            CafoError: the class has no folder.
        """
        names = dict.fromkeys((class_name, with_spaces(class_name), class_name.replace(" ", "_")))
        folder = next((self._root / name for name in names if (self._root / name).is_dir()), None)
        if folder is None:
            raise CafoError(f"{self._root} has no folder {class_name!r}; there should be one per class")
        for path in sorted(p for p in folder.iterdir() if is_image_name(p.name))[:n]:
            yield _decode(path, str(path))


class EndpointGenerator:
    """An OpenAI-compatible images endpoint."""

    def __init__(self, endpoint: Endpoint, size: str = "256x256") -> None:
        self._client, self._size = RateLimitedClient(endpoint), size

    def generate(self, class_name: str, prompt: str, n: int, seed: int) -> Iterator[Image.Image | ImageError]:
        """Send one request per image: not every server makes several, and a refusal then costs one image.

        The endpoint takes no seed.
        """
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
            yield _decode(base64.b64decode(encoded), f"{class_name}, image {number}")


class DiffusersGenerator:
    """A local Stable Diffusion through `diffusers`, an optional extra.

    Raises:
        CafoError: `diffusers` is not installed.
    """

    def __init__(self, model: str, device: str = "cuda", steps: int = 30) -> None:
        try:
            import diffusers
        except ImportError as error:
            raise CafoError(
                "generating images locally needs the optional `diffusers` package; install the `diffusers` extra"
            ) from error
        # safetensors only: the older pickled weights could run code
        pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(model, use_safetensors=True)
        self._pipeline, self._device, self._steps = pipeline.to(device), device, steps

    def generate(self, class_name: str, prompt: str, n: int, seed: int) -> Iterator[Image.Image | ImageError]:
        """Yield `n` images, each from its own seed."""
        for number in range(n):
            rng = torch.Generator(self._device).manual_seed(seed * 1_000_003 + number)
            yield self._pipeline(prompt, num_inference_steps=self._steps, generator=rng).images[0].convert("RGB")


@dataclass(frozen=True, kw_only=True)
class GenerationJob:
    """Generate candidates of every class, keep the K' best by CLIP, and write the images and their list.

    The list is rewritten after each class. A job that is run again goes on with the classes that the list lacks.

    Raises:
        CafoError: `keep` is not between 1 and `candidates`, or the template has not exactly one `{}`.
    """

    generator: ImageGenerator
    encoder: Encoder
    """CLIP's image encoder"""
    classifier: Tensor
    """W, (C, N): the class texts that candidates are scored against"""
    class_names: Sequence[str]
    template: str
    """prompt of the generator, with one `{}` for the class name"""
    folder: str | Path
    """the folder that the images and their list are written to"""
    list_name: str = "dalle_generated.json"
    candidates: int = 16
    """images generated of each class"""
    keep: int = 8
    """K'"""
    seed: int = 0
    """class n is generated with seed + n"""

    def __post_init__(self) -> None:
        refuse_text(self.class_names, "class_names")
        check_templates([self.template])
        if not 1 <= self.keep <= self.candidates:
            raise CafoError(f"keep must be from 1 to the {self.candidates} candidates, got {self.keep}")

    @property
    def list_path(self) -> Path:
        return Path(self.folder) / self.list_name

    def run(self, report: Callable[[str, int, list[str]], None] = lambda class_name, kept, rejected: None) -> Path:
        """Generate the classes that the list lacks, and return the path of the list.

        Args:
            report: called after each class with its name, the number of images kept, and the reasons why others were
                unusable. A class without a usable image is left out of the list, so the next run tries it again.

        Raises:
            CafoError: the list was made with other settings, or of other classes.
        """
        content = self._read_list()
        finished = {label for _, label, _ in content["train"]}
        for label, name in enumerate(self.class_names):
            if label in finished:
                continue
            prompt = self.template.format(with_spaces(name))
            images, rejected = self._generate_candidates(label, prompt)
            scores = clip_scores(self.encoder, images, self.classifier[:, label])
            best = sorted(range(len(images)), key=lambda i: (-scores[i], i))[: self.keep]
            for rank, i in enumerate(best):
                path = self._save_image(images[i], label, rank)
                content["train"].append([path, label, name])
                content["scores"][path] = scores[i]
                content["prompts"][path] = prompt
            write_json(self.list_path, content)
            report(name, len(best), rejected)
        return self.list_path

    def _read_list(self) -> dict[str, Any]:
        """Read the list of an earlier run, or return an empty one."""
        settings = {
            "encoder": self.encoder.identity,
            "template": self.template,
            "candidates": self.candidates,
            "keep": self.keep,
            "seed": self.seed,
        }
        if not self.list_path.exists():
            return {"train": [], "scores": {}, "prompts": {}, "settings": settings}
        content = read_json(self.list_path, "delete it, or give another list_name")
        if content.get("settings") != settings:
            raise CafoError(
                f"{self.list_path} was made with other settings ({content.get('settings')}, now {settings}); "
                "give another list_name"
            )
        names = dict(enumerate(self.class_names))
        if other := [entry for entry in content["train"] if names.get(entry[1]) != entry[2]]:
            path, label, name = other[0]
            raise CafoError(
                f"{self.list_path} is of other classes: {path} is of class {label}, {name!r}, which is now "
                f"{names.get(label, 'not there')!r}; restore the classes, or give another list_name and folder"
            )
        return content

    def _generate_candidates(self, label: int, prompt: str) -> tuple[list[Image.Image], list[str]]:
        """Return the usable candidates of a class, and the reasons why the others are unusable."""
        images: list[Image.Image] = []
        rejected: list[str] = []
        for image in self.generator.generate(self.class_names[label], prompt, self.candidates, self.seed + label):
            if isinstance(image, ImageError):
                rejected.append(str(image))
            else:
                images.append(image)
        return images, rejected

    def _save_image(self, image: Image.Image, label: int, rank: int) -> str:
        """Write one image and return its path relative to the folder."""
        path = f"{label:05d}/{rank:03d}.png"  # named by label, since ImageNet has two classes called crane
        with atomic_path(Path(self.folder) / path) as temporary:
            image.save(temporary, "PNG")
        return path


def clip_scores(encoder: Encoder, images: Sequence[Image.Image], text: Tensor) -> list[float]:
    """Return the cosine similarity of each image with the class text, in the order of the images.

    Args:
        encoder: CLIP's image encoder.
        images: B images.
        text: (C,), of unit norm.
    """
    if not images:
        return []
    batches = [images[i : i + _IMAGES_PER_BATCH] for i in range(0, len(images), _IMAGES_PER_BATCH)]
    features = [encoder.encode_image(torch.stack([encoder.preprocess(image) for image in b])) for b in batches]
    return (torch.cat(features).cpu() @ text.cpu().float()).tolist()


def best_per_class(items: Sequence[Item], keep: int) -> tuple[Item, ...]:
    """Return the first `keep` items of each class: the best, since a generated list is ordered best first."""
    counts: dict[int, int] = {}
    chosen = []
    for item in items:
        counts[item.label] = counts.get(item.label, 0) + 1
        if counts[item.label] <= keep:
            chosen.append(item)
    return tuple(chosen)


def _is_refusal(error: Exception) -> bool:
    """Return whether an endpoint refuses a prompt or its image because of their content.

    Servers word a refusal differently. Any other bad request would fail for every class, so it is not a refusal.
    """
    text = f"{getattr(error, 'code', '')} {error}".lower()
    return getattr(error, "status_code", None) == 400 and any(word in text for word in _REFUSAL_WORDS)


def _decode(source: Path | bytes, name: str) -> Image.Image | ImageError:
    try:
        return load_image(source, name=name)
    except ImageError as error:
        return error
