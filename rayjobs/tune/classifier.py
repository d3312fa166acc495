"""Open the classifier that a sweep has chosen, or a saved one, with the encoders that it reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open

from cafo.cache import Cache, load_cache
from cafo.calibration import Calibration
from cafo.methods import saved
from cafo.methods.saved import FewShotClassifier, load_classifier
from cafo.prediction import used_encoders, used_part
from rayjobs.config import load
from rayjobs.data.feature_store import open_encoders
from rayjobs.errors import ConfigError, ProvenanceError
from rayjobs.models.encoder import EncoderInfo, VisionEncoderConfig, encoder_of
from rayjobs.storage.download import cached_path
from rayjobs.storage.files import read_typed
from rayjobs.tune.selection import SWEEP, ChosenSetting, ChosenTrial, best_choice, read_chosen
from rayjobs.tune.trial import CACHE, RIVAL, open_classifier


@dataclass(frozen=True, kw_only=True)
class OpenedClassifier:
    """A classifier, of which the sources that it leaves out are left out."""

    classifier: Cache | FewShotClassifier
    file: Path
    name: str
    """its method, K and seed, or its file"""
    estimate: str = ""
    """what the sweep says about its accuracy"""

    @property
    def calibration(self) -> Calibration | None:
        """The calibration of its probabilities; None if it was chosen on no held-out images."""
        return self.classifier.calibration if isinstance(self.classifier, Cache) else None

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the features that it reads: of encoders, or of what comes before their last projection."""
        return used_encoders(self.classifier) if isinstance(self.classifier, Cache) else (self.classifier.source,)

    def configs(self, encoders: Mapping[str, VisionEncoderConfig]) -> dict[str, VisionEncoderConfig]:
        """Return the encoders that it reads, of those that a config has.

        Raises:
            ConfigError: one is not there.
        """
        names = [encoder_of(source) for source in self.sources]
        if missing := [name for name in names if name not in encoders]:
            keys = ", ".join(f"encoders.{name}" for name in missing)
            raise ConfigError(f"{self.file} reads encoders that are not given: set {keys}")
        return {name: encoders[name] for name in names}

    def open_encoders(self, encoders: Mapping[str, VisionEncoderConfig]) -> dict[str, EncoderInfo]:
        """Open the encoders that it reads, by the names of the features.

        Raises:
            ConfigError: one is not there.
            EncoderError: one cannot be loaded.
            ProvenanceError: one is not the encoder that it was fitted with.
        """
        unprojected = [encoder_of(source) for source in self.sources if source != encoder_of(source)]
        opened = open_encoders(self.configs(encoders), unprojected)
        infos = {source: opened[source] for source in self.sources}
        for name, info in infos.items():
            self.check_encoder(name, info.identity)
        return infos

    def check_encoder(self, source: str, identity: str) -> None:
        """Raise ProvenanceError if features of a source come from another encoder than the one it was fitted with."""
        if (before := self.classifier.encoders.get(source)) != identity:
            raise ProvenanceError(
                f"encoders.{encoder_of(source)}: {self.file} was fitted with {before}, the weights are now {identity}; "
                "put back the weights that it was fitted with"
            )


@dataclass(frozen=True, kw_only=True)
class _Swept:
    """The part of a sweep's record that is read."""

    encoders: dict[str, dict[str, Any]] = field(default_factory=dict)


_SWEPT = TypeAdapter(_Swept)


def open_run(folder: Path) -> tuple[OpenedClassifier, dict[str, VisionEncoderConfig]]:
    """Open the best classifier that a run of cafo-tune or cafo has chosen; also return the run's encoders.

    Raises:
        ConfigError, DataError: the run has not chosen, or its files are damaged.
        CafoError: the classifier cannot be read.
    """
    way_out = "; delete it, and start cafo-tune again with the same settings"
    swept = read_typed(folder / SWEEP, _SWEPT, "the record of a sweep", way_out=way_out)
    encoders = {name: load(VisionEncoderConfig, values) for name, values in swept.encoders.items()}
    return open_chosen(folder, read_chosen(folder), method=None, shots=None, seed=None), encoders


def open_chosen(
    folder: Path, chosen: Sequence[ChosenSetting], *, method: str | None, shots: int | None, seed: int | None
) -> OpenedClassifier:
    """Open a classifier that a sweep has chosen.

    Args:
        folder: the sweep's run folder.
        chosen: its choices, one for each K and method.
        method, shots: the choice; None takes the one with the highest accuracy on the images of the choices.
        seed: seed of the trial; None takes the one with the highest accuracy on those images.

    Raises:
        ConfigError: there is no such choice.
        CafoError: its file cannot be read.
    """
    fitting = [choice for choice in chosen if method in (None, choice.method) and shots in (None, choice.shots)]
    if not fitting:
        there = ", ".join(f"{choice.method!r} at {choice.shots} shots" for choice in chosen)
        raise ConfigError(f"{folder} has chosen no classifier of method={method} and shots={shots}; it has {there}")
    choice = best_choice(fitting)
    trials = [trial for trial in choice.seeds if seed in (None, trial.seed)]
    if not trials:
        seeds = ", ".join(str(trial.seed) for trial in choice.seeds)
        raise ConfigError(f"seed is {seed}, and {folder} has seeds {seeds}")
    trial = max(trials, key=_accuracy)
    rival = folder / "trials" / trial.trial / RIVAL
    estimate = choice.estimate()
    told = f"estimated accuracy {estimate}" if estimate else ""
    if not told and choice.accuracy is not None:
        told = f"{choice.accuracy:.1%} on {choice.select}"
    return OpenedClassifier(
        classifier=_used(open_classifier(folder / "trials", trial.trial)),
        file=rival if rival.exists() else folder / "trials" / trial.trial / CACHE,
        name=f"{choice.method} at {choice.shots} shots, seed {trial.seed}",
        estimate=told,
    )


def open_saved(path: Path) -> OpenedClassifier:
    """Open a file that `CaFo.save` wrote, or a sweep's trial.

    Raises:
        CafoError: it cannot be read.
    """
    copy = cached_path(path)
    loaded = load_classifier(copy) if _format(copy) == saved.FORMAT else load_cache(copy)
    return OpenedClassifier(classifier=_used(loaded), file=path, name=path.name)


def _used(classifier: Cache | FewShotClassifier) -> Cache | FewShotClassifier:
    return used_part(classifier) if isinstance(classifier, Cache) else classifier


def _accuracy(trial: ChosenTrial) -> float:
    return -1.0 if trial.accuracy is None else trial.accuracy


def _format(path: Path) -> str:
    """Return the format in a file's header; empty if it has none."""
    try:
        with safe_open(str(path), "pt") as file:
            return (file.metadata() or {}).get("format", "")
    except (SafetensorError, OSError):
        return ""
