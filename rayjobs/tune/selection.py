"""Choose settings among a sweep's trials: by mean accuracy over seeds, on the images that each trial chose on."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, with_config

from cafo.choice_names import Select
from cafo.estimate import Estimate
from rayjobs.errors import ConfigError, DataError
from rayjobs.storage.files import read_object
from rayjobs.storage.paths import inside
from rayjobs.tune.search_space import Hyperparameter, SearchConfig, Setting, Trial
from rayjobs.tune.trial import CACHE, RIVAL, TrialResult

SWEEP = "sweep.json"
"""File of a run: the settings that a sweep's results depend on; config.yaml has those of the job that was started,
perhaps cafo's."""
CHOSEN = "chosen.json"
"""File of a run: the settings that a sweep has chosen."""


@with_config(extra="forbid")  # a field of a later version is refused
@dataclass(frozen=True, kw_only=True)
class ChosenTrial:
    """A trial of a chosen setting, and what it has chosen."""

    seed: int
    trial: str
    accuracy: float | None
    """on the images of the choice; None if it was made on none"""
    alpha: float | None
    """None for a rival, like the next two"""
    beta: float | None
    ensemble: str | None
    """JSON of the ensemble"""
    hyperparameters: str | None = None
    """JSON of a rival's hyperparameters; None for CaFo"""
    estimate_correct: int | None = None
    """correct images of the estimate of the accuracy on new images; None if none was made"""
    estimate_images: int | None = None
    """all images of that estimate"""

    def __post_init__(self) -> None:
        one_alone = (self.estimate_correct is None) != (self.estimate_images is None)
        if one_alone or not 0 <= (self.estimate_correct or 0) <= (self.estimate_images or 0):
            raise DataError(f"{self.estimate_correct} of {self.estimate_images} images cannot be correct")

    def to_json(self) -> dict[str, Any]:
        """The values as plain data; `hyperparameters` of rivals alone."""
        return {n: v for n, v in asdict(self).items() if n != "hyperparameters" or v is not None}


@with_config(extra="forbid")  # a field of a later version is refused
@dataclass(frozen=True, kw_only=True)
class ChosenSetting:
    """The chosen setting of one K and one combination of compared values: an entry of `chosen.json`."""

    shots: int
    method: str
    """the name of its table row"""
    group: dict[str, Any]
    """the compared values"""
    setting: Setting
    select: Select | Literal["none"]
    """what the choice was made on"""
    accuracy: float | None
    """mean over seeds, on the images of the choice; None if it was made on none"""
    finished: int
    """settings that finished at every seed, among which it was chosen"""
    stopped: int
    """settings of which a scheduler stopped a trial"""
    seeds: tuple[ChosenTrial, ...]
    """its trials, one for each seed"""

    def estimate(self) -> Estimate | None:
        """The estimate of the accuracy on new images: the mean over seeds, with the interval of one seed's images.

        The seeds' images may be the same, so more seeds make the interval no narrower.
        """
        known = [(t.estimate_correct, t.estimate_images) for t in self.seeds if t.estimate_images]
        if not known:
            return None
        correct, total = (sum(numbers) / len(known) for numbers in zip(*known, strict=True))
        return Estimate(correct=correct, total=total)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "setting": self.setting.to_json(), "seeds": [trial.to_json() for trial in self.seeds]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ChosenSetting":
        """Read a choice as `chosen.json` holds it. Raises DataError for a trial's name that leads out of its folder."""
        choice = _CHOICES.validate_python(values)
        for trial in choice.seeds:
            inside(Path("trials"), trial.trial)
        return choice


_CHOICES = TypeAdapter(ChosenSetting)


def read_chosen(folder: Path) -> list[ChosenSetting]:
    """Read the choices of a sweep's run folder.

    Raises:
        DataError: the file is missing, or is no choice.
    """
    path = folder / CHOSEN
    try:
        return [ChosenSetting.from_json(choice) for choice in read_object(path)["chosen"]]
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no choice ({error}); run cafo-tune again to write it") from error


def choose_settings(
    results: Sequence[tuple[Trial, TrialResult]], compare: Sequence[Hyperparameter]
) -> list[ChosenSetting]:
    """For every K and combination of compared values, choose the setting with the best mean accuracy over seeds.

    Only settings that finished at every seed are compared, as a stopped trial has no accuracy. Ties go to the setting
    that was enumerated first, and so does a choice on no image.
    """
    seeds = {trial.seed for trial, _ in results}
    groups: dict[tuple[Hashable, ...], dict[Setting, list[TrialResult]]] = {}
    for trial, result in results:
        groups.setdefault(trial.group_key(compare), {}).setdefault(trial.setting, []).append(result)
    return [_choose(group, compare, len(seeds)) for group in groups.values()]


def _choose(group: dict[Setting, list[TrialResult]], compare: Sequence[Hyperparameter], seeds: int) -> ChosenSetting:
    complete = {
        setting: trials
        for setting, trials in group.items()
        if len(trials) == seeds and all(trial.status == "finished" for trial in trials)
    }
    # sums of correct predictions, not of accuracies: every trial has the same images, and integers do not round
    setting = max(complete, key=lambda setting: sum(trial.correct or 0 for trial in complete[setting]))
    values = setting.compared_values(compare)
    trials = tuple(_chosen_trial(trial) for trial in complete[setting])
    return ChosenSetting(
        shots=complete[setting][0].shots,
        method=method_name(values),
        group=values,
        setting=setting,
        select=complete[setting][0].select or "val",
        accuracy=_mean([trial.accuracy for trial in trials]),
        finished=len(complete),
        stopped=sum(any(trial.status == "stopped" for trial in trials) for trials in group.values()),
        seeds=trials,
    )


def _chosen_trial(result: TrialResult) -> ChosenTrial:
    return ChosenTrial(
        seed=result.seed,
        trial=result.trial,
        accuracy=result.accuracy,
        alpha=result.chosen_alpha,
        beta=result.chosen_beta,
        ensemble=result.chosen_ensemble,
        hyperparameters=result.hyperparameters,
        estimate_correct=result.estimate_correct,
        estimate_images=result.estimate_images,
    )


def _mean(accuracies: Sequence[float | None]) -> float | None:
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    return sum(known) / len(known) if known else None


def row_name(setting: Setting, compare: Sequence[Hyperparameter]) -> str:
    """The name of the table row that a setting belongs to."""
    return method_name(setting.compared_values(compare))


def check_reference(reference: str | None, rows: Iterable[str]) -> None:
    """Raise ConfigError if the tables will have no row of this name."""
    names = list(dict.fromkeys(rows))
    if reference is not None and reference not in names:
        raise ConfigError(f"reference: there is no row called {reference!r}; there are {', '.join(names)}")


def method_name(values: dict[str, Any]) -> str:
    """The name of a table row, made of the compared values; `CaFo` if there are none."""
    names = [
        " + ".join(value)
        if isinstance(value, tuple | list)
        else value
        if name in ("method", "ensemble")
        else f"{name} {value}"
        for name, value in values.items()
        if value != ""
    ]
    return ", ".join(names) or "CaFo"


def edge_notices(chosen: Sequence[ChosenSetting], search: SearchConfig) -> Iterator[str]:
    """Yield sentences about the chosen trials whose α or β is at the edge of its range."""
    grid = search.grid()
    for choice in chosen:
        seeds: dict[str, list[int]] = {}
        for trial in choice.seeds:
            if trial.alpha is None or trial.beta is None:
                continue  # a rival's, whose grids are its authors'
            notice = grid.edge_notice(
                trial.alpha, trial.beta, low_setting="search.beta_low", high_setting="search.beta_high"
            )
            seeds.setdefault(notice, []).append(trial.seed)
        for notice, at in seeds.items():
            if notice:
                yield f"{choice.method} at K={choice.shots}, seed {', '.join(map(str, at))}: {notice}"


def best_choice(chosen: Sequence[ChosenSetting]) -> ChosenSetting:
    """The chosen setting with the best accuracy on the images of its choice, which the headline names."""
    return max(chosen, key=lambda choice: -1.0 if choice.accuracy is None else choice.accuracy)


def reference_method(chosen: Sequence[ChosenSetting]) -> str | None:
    """The row that others are compared with: `CaFo`, or else the best of CaFo's rows at the most shots.

    The best one is that of the choices' images, so that no test image has a say. None without a row of CaFo.
    """
    own = [choice for choice in chosen if not choice.setting.rival]
    if not own:
        return None
    if any(choice.method == "CaFo" for choice in own):
        return "CaFo"
    most = max(choice.shots for choice in own)
    return best_choice([choice for choice in own if choice.shots == most]).method


def settings_to_plot(chosen: Sequence[ChosenSetting]) -> list[ChosenSetting]:
    """The best chosen setting, then each other method's at its largest K."""
    best = best_choice(chosen)
    by_method = {best.method: best}
    for choice in sorted(chosen, key=lambda choice: -choice.shots):
        by_method.setdefault(choice.method, choice)
    return list(by_method.values())


def remove_other_caches(folder: Path, chosen: Sequence[ChosenSetting]) -> None:
    """Remove the classifiers of all trials but the chosen ones: a thousand trials of ImageNet would take 200 GB."""
    chosen_trials = {trial.trial for choice in chosen for trial in choice.seeds}
    for name in (CACHE, RIVAL):
        for file in (folder / "trials").rglob(name):
            if file.parent.name not in chosen_trials:
                file.unlink(missing_ok=True)
