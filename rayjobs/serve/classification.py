"""Classification of images for many callers at once, by one thread that encodes together what waits together.

While a batch is encoded, further images wait; the next batch takes them all. So an image alone is not held back, and
under load the encoders see large batches, also of images for different classifiers that read the same encoder.

Legend: B images of a batch, C width of an encoder's features, K classes that are returned, N classes.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rayjobs.serve.api_errors import ApiError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from cafo.cache import Cache
    from rayjobs.serve.classifiers import ClassifierFolder, FeatureSource, LoadedClassifier

logger = logging.getLogger(__name__)

_Pixels = Mapping[str, "Tensor"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The parts of a classification that are asked for."""

    top: int = 5
    """K, the likeliest classes that are returned."""
    evidence: int = 5
    """Training images that are named; 0 for none."""
    coverage: float | None = None
    """Probability with which an image's class should be in its prediction set; None for no set."""


@dataclass(frozen=True, eq=False)
class _Waiting:
    """An image that waits."""

    classifier: LoadedClassifier
    pixels: _Pixels
    """source → (3, S, S)"""
    asked: Asked
    result: Future[dict[str, Any]] = field(default_factory=Future)


class ClassificationWorker:
    """Classifies images in a thread of its own. Its methods may be called from any thread."""

    def __init__(self, classifiers: ClassifierFolder, *, batch: int = 32, max_waiting: int = 256) -> None:
        """batch: images that are encoded together. max_waiting: images that may wait."""
        self.classifiers, self.batch = classifiers, batch
        self._queue: queue.Queue[_Waiting | None] = queue.Queue(max_waiting)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="classification", daemon=True)
        self._thread.start()

    def submit(self, name: str, image: Image.Image, asked: Asked) -> Future[dict[str, Any]]:
        """Load a classifier, prepare an image for its encoders, and queue it.

        Returns the future result, as `describe` gives it. Raises ApiError: 404 for an unknown classifier, 400 for a
        coverage that it cannot give, 429 if too many images wait, 503 if the classifier cannot be loaded or the worker
        is closed.
        """
        from cafo.errors import CafoError
        from cafo.prediction import set_threshold
        from rayjobs.errors import is_user_error

        try:
            classifier = self.classifiers.load(name)
        except ApiError:
            raise
        except Exception as error:
            if not is_user_error(error):
                raise
            logger.error("the classifier %s cannot be loaded: %s", name, error)  # the message names files
            raise ApiError(
                f"the classifier {name} cannot be loaded; the server's log says why",
                status=503,
                param="model",
                code="model_not_loaded",
            ) from error
        try:
            if asked.coverage is not None:
                set_threshold(classifier.opened.calibration, asked.coverage)
        except CafoError as error:
            raise ApiError(str(error), param="coverage") from error
        waiting = _Waiting(classifier, {n: s.preprocess(image) for n, s in classifier.sources.items()}, asked)
        if self._closed:
            raise ApiError("the server is closing", status=503)
        try:
            self._queue.put_nowait(waiting)
        except queue.Full:
            raise ApiError(
                f"{self._queue.maxsize} images wait already: ask again later", status=429, code="queue_full"
            ) from None
        return waiting.result

    def close(self) -> None:
        """Stop after the present batch. Images that wait get an ApiError with status 503."""
        self._closed = True
        while True:  # the thread empties the queue, or has ended
            try:
                self._queue.put(None, timeout=0.1)
                break
            except queue.Full:
                continue
        self._thread.join()
        while not self._queue.empty():
            if (waiting := self._queue.get()) is not None:
                waiting.result.set_exception(ApiError("the server is closing", status=503))

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            batch = [first]
            while len(batch) < self.batch and not self._queue.empty():
                if (following := self._queue.get()) is None:
                    self._queue.put(None)
                    break
                batch.append(following)
            # A caller that has gone has cancelled its future.
            _answer([waiting for waiting in batch if waiting.result.set_running_or_notify_cancel()])


def _answer(batch: Sequence[_Waiting]) -> None:
    """Give each image of a batch its result. Where the batch fails, each is tried alone, so that one fails no other."""
    try:
        results = [describe(w.classifier, f, w.asked) for w, f in zip(batch, encode_together(batch), strict=True)]
    except Exception as error:  # whatever it is, nobody may wait for an answer that does not come
        if len(batch) > 1:
            for waiting in batch:
                _answer([waiting])
            return
        logger.exception("an image failed")
        batch[0].result.set_exception(error)
        return
    for waiting, result in zip(batch, results, strict=True):
        waiting.result.set_result(result)


def encode_together(batch: Sequence[_Waiting]) -> list[dict[str, Tensor]]:
    """Return the features {source: (1, C)} of each image; images that read the same encoder are encoded together."""
    import torch

    jobs: dict[tuple[int, bool], list[tuple[FeatureSource, int, str]]] = {}
    for number, waiting in enumerate(batch):
        for name, source in waiting.classifier.sources.items():
            jobs.setdefault((id(source.encoder), source.unprojected), []).append((source, number, name))
    features: list[dict[str, Tensor]] = [{} for _ in batch]
    with torch.inference_mode():
        for parts in jobs.values():
            pixels = torch.stack([batch[number].pixels[name] for _, number, name in parts])
            rows = parts[0][0].encode(pixels).split(1)
            for (_, number, name), row in zip(parts, rows, strict=True):
                features[number][name] = row
    return features


def describe(classifier: LoadedClassifier, features: Mapping[str, Tensor], asked: Asked) -> dict[str, Any]:
    """Return the answer about one image.

    features: {source: (1, C)}.

    Returns `data`, the K likeliest classes as {label, probability}; `margin`, by how much the first is more probable
    than the second; `calibrated`; `prediction_set`, if a coverage was asked for; and `evidence`, None for a classifier
    without keys.
    """
    from cafo.cache import Cache
    from cafo.prediction import rank

    found, names = classifier.opened.classifier, classifier.opened.classifier.class_names
    calibration = classifier.opened.calibration
    ranked = rank(found.logits(features), calibration, asked.top, asked.coverage)
    labels, probabilities = ranked.labels[0].tolist(), ranked.probabilities[0].tolist()
    answer: dict[str, Any] = {
        "data": [{"label": names[n], "probability": p} for n, p in zip(labels, probabilities, strict=True)],
        "margin": float(ranked.margins[0]),
        "calibrated": calibration is not None,
    }
    if ranked.sets is not None:
        answer["prediction_set"] = [names[n] for n in ranked.sets[0]]
    answer["evidence"] = None
    if isinstance(found, Cache) and asked.evidence:
        answer["evidence"] = _evidence(found, features, asked.evidence)
    return answer


def _evidence(cache: Cache, features: Mapping[str, Tensor], count: int) -> dict[str, Any]:
    """Explain the decision between the two likeliest classes: the text's part, the largest keys' parts, the others'."""
    from cafo.inspection import explain

    why = next(explain(cache, features, count))
    images = [
        {
            "name": cache.key_names[vote.key] if cache.key_names else f"training image {vote.key}",
            "label": cache.class_names[vote.label],
            "weight": vote.pull,
        }
        for vote in why.votes
    ]
    return {
        "label": cache.class_names[why.label],
        "rival": cache.class_names[why.rival],
        "difference": why.margin,
        "text": why.text,
        "images": images,
        "other_images": why.others,
    }
