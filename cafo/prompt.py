"""Step 1, prompt: a language model describes the classes, and CLIP's text tower turns the sentences into a classifier.

CaFo (arXiv 2303.02151), section 3.2: five commands per class, ten answers each. Every sentence is encoded and
normalised, the mean of a class is normalised again, and the N means are the columns of W ∈ R^{C×N}: p_ZS = 100 f W.

File: JSON `{class name: [sentence, …]}`, CaFo's own format. A class name matches with underscores or with spaces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from cafo.errors import CafoError
from cafo.files import as_path, read_json, write_json
from cafo.openai_client import Endpoint, RateLimitedClient

if TYPE_CHECKING:  # a protocol alone should not import the towers' libraries
    from cafo.encoders import TextEncoder

COMMANDS = (
    "Describe what a {} looks like",
    "How can you identify a {}?",
    "What does a {} look like?",
    "Describe an image from the internet of a {}",
    "A caption of an image of a {}:",
)
ANSWERS = 10

_TEXTS_AT_ONCE = 256


class LanguageModel(Protocol):
    """Whatever can answer a command about a class."""

    def describe(self, class_name: str, command: str, n: int) -> list[str]:
        """Up to `n` answers to `command`, in which `{}` stands for the class name."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an endpoint's answers are drawn: varied, and short enough for CLIP's window."""

    temperature: float = 0.99
    max_tokens: int = 50
    system: str = "Answer in one plain sentence."


class EndpointModel:
    """A `LanguageModel` behind an OpenAI-compatible chat endpoint."""

    def __init__(self, endpoint: Endpoint, sampling: Sampling | None = None) -> None:
        self._client, self._sampling = RateLimitedClient(endpoint), sampling or Sampling()

    def describe(self, class_name: str, command: str, n: int) -> list[str]:
        """Ask until there are `n` answers: many servers give one, whatever `n` says.

        Raises:
            ValueError: the endpoint's client or key is missing.
            openai.OpenAIError: the endpoint refuses, or still fails after its retries.
        """
        sampling = self._sampling
        answers: list[str] = []
        for _ in range(n):
            reply = self._client.acquire().chat.completions.create(
                model=self._client.endpoint.model,
                messages=[
                    {"role": "system", "content": sampling.system},
                    {"role": "user", "content": command.format(with_spaces(class_name))},
                ],
                n=n - len(answers),
                temperature=sampling.temperature,
                max_tokens=sampling.max_tokens,
            )
            answers += [choice.message.content or "" for choice in reply.choices]
            if len(answers) >= n:
                break
        return answers[:n]


def describe_classes(
    model: LanguageModel,
    class_names: Sequence[str],
    path: str | Path,
    *,
    commands: Sequence[str] = COMMANDS,
    answers: int = ANSWERS,
    report: Callable[[str, int], None] = lambda class_name, sentences: None,
) -> dict[str, list[str]]:
    """Ask every command about every class and write CaFo's JSON; classes already in the file are not asked again.

    The file is rewritten, whole, after each class, so that a stop at any time loses one class at most.

    Args:
        report: called with each class that was asked and how many sentences it got.

    Returns:
        {class name: sentences} of all classes.

    Raises:
        ValueError: a command without `{}`, or a class to which the model answers nothing.
    """
    if wrong := [command for command in commands if command.count("{}") != 1]:
        raise CafoError(f"a command needs one {{}} for the class name: {wrong[0]!r}")
    path = Path(path)
    known = _read(path) if path.exists() else {}
    for name in class_names:
        if _find(known, name):
            continue
        replies = [model.describe(name, command, answers) for command in commands]
        sentences = [" ".join(text.split()) for texts in replies for text in texts if text.strip()]
        if not sentences:
            raise CafoError(f"the language model says nothing about {name!r}; what it said of others is kept")
        known[name] = sentences
        write_json(path, known)
        report(name, len(sentences))
    return {name: _find(known, name) for name in class_names}


def read_prompts(path: str | Path, class_names: Sequence[str]) -> dict[str, list[str]]:
    """{class name: sentences} of the class list from a file in CaFo's format; other classes of the file are left out.

    Raises:
        ValueError: the file is missing or malformed, or classes have no sentence (all named).
    """
    known = _read(as_path(path))
    prompts = {name: _find(known, name) for name in class_names}
    if without := [name for name, sentences in prompts.items() if not sentences]:
        listed = ", ".join(without[:20]) + (" …" if len(without) > 20 else "")
        raise CafoError(
            f"{path} has no sentence for {len(without)} of {len(class_names)} classes: {listed}; "
            "run the prompt step again (it asks for these only), or use templates"
        )
    return prompts


def template_prompts(templates: Sequence[str], class_names: Sequence[str]) -> dict[str, list[str]]:
    """The fallback without a language model: the data set's templates, filled in."""
    return {name: [template.format(with_spaces(name)) for template in templates] for name in class_names}


def with_spaces(class_name: str) -> str:
    """A class name as one says it: spaces for underscores."""
    return class_name.replace("_", " ")


class Classifier(NamedTuple):
    """CLIP's zero-shot classifier."""

    weights: Tensor
    """W, (C, N) float32, columns of unit norm"""
    sentences: int
    """how many were encoded"""
    truncated: tuple[str, ...]
    """those over CLIP's window, which were cut"""


def zero_shot_classifier(
    encoder: TextEncoder, prompts: Mapping[str, Sequence[str]], class_names: Sequence[str]
) -> Classifier:
    """Encode, normalise, average per class, normalise (section 3.2).

    Raises:
        ValueError: classes without a sentence, all named.
    """
    if without := [name for name in class_names if not prompts.get(name)]:
        raise CafoError(f"no sentence for {len(without)} of {len(class_names)} classes: {', '.join(without[:20])}")
    texts = [text for name in class_names for text in prompts[name]]
    counts = [len(prompts[name]) for name in class_names]
    batches = [texts[i : i + _TEXTS_AT_ONCE] for i in range(0, len(texts), _TEXTS_AT_ONCE)]
    features = torch.cat([encoder.encode_text(batch).cpu() for batch in batches])  # (T, C)
    means = torch.stack([part.mean(dim=0) for part in features.split(counts)])
    truncated = tuple(text for text in texts if encoder.is_truncated(text))
    return Classifier(F.normalize(means, dim=-1).T.contiguous(), len(texts), truncated)


def _read(path: Path) -> dict[str, list[str]]:
    content = read_json(path, "run the prompt step, or use templates")
    if not isinstance(content, dict):
        raise CafoError(f"{path} should be an object of class names and sentences, got a {type(content).__name__}")
    for name, sentences in content.items():
        if not isinstance(sentences, list) or not all(isinstance(s, str) and s.strip() for s in sentences):
            raise CafoError(f"{path}: {name!r} should have a list of sentences, got {str(sentences)[:80]}")
    return content


def _find(known: Mapping[str, list[str]], name: str) -> list[str]:
    return known.get(name) or known.get(with_spaces(name)) or known.get(name.replace(" ", "_")) or []
