"""Step 1, prompt: a language model describes the classes, and CLIP's text encoder makes a classifier of the sentences.

CaFo (arXiv 2303.02151), section 3.2: five commands per class, ten answers each. Every sentence is encoded and
normalised, the mean of a class is normalised again, and the N means are the columns of W ∈ R^{C×N}: p_ZS = 100 f W.

File: JSON `{class name: [sentence, …]}`, CaFo's own format. Class names are compared with underscores and spaces taken
as equal.

Legend: C width of CLIP's features, N classes, T sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cafo.dataset_layouts import check_templates
from cafo.errors import CafoError, refuse_text
from cafo.files import as_path, read_json, write_json
from cafo.openai_client import Endpoint, RateLimitedClient

if TYPE_CHECKING:  # for annotations only: a config's sections read this module's commands, and spare PyTorch
    from torch import Tensor

    from cafo.encoders import TextEncoder

COMMANDS = (
    "Describe what a {} looks like",
    "How can you identify a {}?",
    "What does a {} look like?",
    "Describe an image from the internet of a {}",
    "A caption of an image of a {}:",
)
"""The paper's five commands, with `{}` for the class name."""

ANSWERS = 10
"""Answers to each command in the paper."""

_TEXTS_PER_BATCH = 256


class LanguageModel(Protocol):
    """A model that answers a command about a class."""

    def describe(self, class_name: str, command: str, n: int) -> list[str]:
        """Return up to `n` answers to `command`, in which `{}` stands for the class name."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings of an endpoint; the defaults give varied answers that are short enough for CLIP's window."""

    temperature: float = 0.99
    max_tokens: int = 50
    system: str = "Answer in one plain sentence."


class EndpointModel:
    """A `LanguageModel` behind an OpenAI-compatible chat endpoint."""

    def __init__(self, endpoint: Endpoint, sampling: Sampling | None = None) -> None:
        self._client, self._sampling = RateLimitedClient(endpoint), sampling or Sampling()

    def describe(self, class_name: str, command: str, n: int) -> list[str]:
        """Send requests until there are `n` answers: many servers return one per request, whatever `n` says.

        Raises:
            CafoError: the `openai` package or the endpoint's key is missing.
            openai.OpenAIError: the endpoint refuses the request, or still fails after the retries.
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
    """Ask the model every command about every class, and write the answers as CaFo's JSON.

    Classes that the file already has are not asked again. The file is rewritten atomically after each class, so an
    interruption loses one class at most.

    Args:
        model: the language model.
        class_names: the classes.
        path: the JSON file.
        commands: commands with one `{}` for the class name.
        answers: answers to each command.
        report: called after each class with its name and its number of sentences.

    Returns:
        {class name: sentences} of all classes.

    Raises:
        CafoError: a command without exactly one `{}`, or a class about which the model answers nothing.
    """
    refuse_text(class_names, "class_names")
    check_templates(commands, "command")
    path = Path(path)
    known = _read_sentences(path) if path.exists() else {}
    for name in class_names:
        if _lookup(known, name):
            continue
        replies = [model.describe(name, command, answers) for command in commands]
        sentences = [" ".join(text.split()) for texts in replies for text in texts if text.strip()]
        if not sentences:
            raise CafoError(
                f"the language model gave no answer about {name!r}; run again to retry, other classes are in {path}"
            )
        known[name] = sentences
        write_json(path, known)
        report(name, len(sentences))
    return {name: _lookup(known, name) for name in class_names}


def read_prompts(path: str | Path, class_names: Sequence[str]) -> dict[str, list[str]]:
    """Read the sentences of the given classes from a file in CaFo's format: {class name: sentences}.

    Raises:
        CafoError: the file is missing or malformed, or classes have no sentence; they are named.
    """
    refuse_text(class_names, "class_names")
    known = _read_sentences(as_path(path))
    prompts = {name: _lookup(known, name) for name in class_names}
    if without := [name for name, sentences in prompts.items() if not sentences]:
        listed = ", ".join(without[:20]) + (" …" if len(without) > 20 else "")
        raise CafoError(
            f"{path} has no sentence for {len(without)} of {len(class_names)} classes: {listed}; "
            "run the prompt step again (it asks for these only), or use templates"
        )
    return prompts


def template_prompts(templates: Sequence[str], class_names: Sequence[str]) -> dict[str, list[str]]:
    """Return the templates filled in with each class name; they take the place of a language model's sentences.

    Raises:
        CafoError: a template without exactly one `{}`, or text in place of a list.
    """
    refuse_text(class_names, "class_names")
    check_templates(templates)
    return {name: [template.format(with_spaces(name)) for template in templates] for name in class_names}


def with_spaces(class_name: str) -> str:
    """Return a class name with spaces in place of underscores, as it is written in a sentence."""
    return class_name.replace("_", " ")


class Classifier(NamedTuple):
    """CLIP's zero-shot classifier."""

    weights: Tensor
    """W, (C, N) float32, columns of unit norm"""
    sentences: int
    """number of sentences that were encoded"""
    truncated: tuple[str, ...]
    """sentences longer than CLIP's text window, which were cut"""
    embeddings: Tensor
    """(T, C) float32 of unit norm: each sentence's, class by class"""
    counts: tuple[int, ...]
    """number of sentences of each class"""


def zero_shot_classifier(
    encoder: TextEncoder, prompts: Mapping[str, Sequence[str]], class_names: Sequence[str]
) -> Classifier:
    """Encode the sentences, average them for each class, and scale the means to unit norm (section 3.2).

    Args:
        encoder: CLIP's text encoder.
        prompts: {class name: sentences}.
        class_names: the N classes, in the order of the columns of W.

    Raises:
        CafoError: classes without a sentence, or with something else than a list of sentences; they are named.
    """
    embeddings = list(encode_sentences(encoder, prompts, class_names))
    return average_sentences(encoder, prompts, class_names, embeddings)


def encode_sentences(
    encoder: TextEncoder, prompts: Mapping[str, Sequence[str]], class_names: Sequence[str]
) -> Iterator[Tensor]:
    """Yield the embeddings of the classes' sentences, class by class: (T, C) in batches. Arguments and errors are those
    of `zero_shot_classifier`."""
    refuse_text(class_names, "class_names")
    for name in class_names:
        _check_sentences(name, prompts.get(name, []), "prompts")
    if without := [name for name in class_names if not prompts.get(name)]:
        raise CafoError(f"no sentence for {len(without)} of {len(class_names)} classes: {', '.join(without[:20])}")
    texts = [text for name in class_names for text in prompts[name]]
    for i in range(0, len(texts), _TEXTS_PER_BATCH):
        yield encoder.encode_text(texts[i : i + _TEXTS_PER_BATCH]).cpu()


def average_sentences(
    encoder: TextEncoder,
    prompts: Mapping[str, Sequence[str]],
    class_names: Sequence[str],
    embeddings: Sequence[Tensor],
) -> Classifier:
    """Return the classifier of the batches that `encode_sentences` has yielded for the same arguments."""
    import torch
    from torch.nn import functional as F

    texts = [text for name in class_names for text in prompts[name]]
    counts = [len(prompts[name]) for name in class_names]
    features = torch.cat(list(embeddings))  # (T, C)
    means = torch.stack([part.mean(dim=0) for part in features.split(counts)])
    truncated = tuple(text for text in texts if encoder.is_truncated(text))
    weights = F.normalize(means, dim=-1).T.contiguous()
    return Classifier(weights, len(texts), truncated, features.float(), tuple(counts))


def sentences_by_class(embeddings: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the sentences of each class: (T, C) → (N, P, C), P the most sentences that a class has.

    A class that has fewer begins again with its first.

    Args:
        embeddings: those of all sentences, class by class.
        counts: number of sentences of each of the N classes.
    """
    import torch

    turn = torch.arange(max(counts))
    return torch.stack([part[turn % len(part)] for part in embeddings.split(list(counts))])


def _read_sentences(path: Path) -> dict[str, list[str]]:
    content = read_json(path, "run the prompt step, or use templates")
    if not isinstance(content, dict):
        raise CafoError(f"{path} should be an object of class names and sentences, got a {type(content).__name__}")
    for name, sentences in content.items():
        _check_sentences(name, sentences, path)
    return content


def _check_sentences(name: str, sentences: object, where: object) -> None:
    if not isinstance(sentences, list | tuple) or not all(isinstance(s, str) and s.strip() for s in sentences):
        raise CafoError(f"{where}: {name!r} should have a list of sentences, got {str(sentences)[:80]!r}")


def _lookup(known: Mapping[str, list[str]], name: str) -> list[str]:
    """Return the sentences of a class, whether its name is written with underscores or spaces."""
    return known.get(name) or known.get(with_spaces(name)) or known.get(name.replace(" ", "_")) or []
