"""One trial of a rival: fit a few-shot method on the shared features, choose its hyperparameters, and save it.

The choice is made on the images that CaFo's is made on. Training images are held out by a cross-fit also where CaFo
leaves one out, which only an untrained cache can do at no cost; and where CaFo falls back on its prior, a rival keeps
its authors' defaults. It runs on the CPU.

Legend: V views, M' images that may become keys, C width of the features, N classes, P sentences of a class.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cafo.choice_names import Select
from cafo.methods.base import Features, FewShotImages, Projection, reads_unprojected
from cafo.methods.choice import Chosen, fit_and_choose
from cafo.methods.choice import Select as SelectMethod
from cafo.methods.saved import FewShotClassifier, save_classifier
from rayjobs.models.encoder import unprojected_source
from rayjobs.storage.files import atomic_path
from rayjobs.tune.search_space import SearchConfig, Trial
from rayjobs.tune.trial import RIVAL, SharedInputs, TrialResult, shared_tensor

CHOSEN_ON: dict[Select, SelectMethod] = {
    "val": "val",
    "crossfit": "crossfit",
    "leave_one_out": "crossfit",
    "prior": "none",
}
"""{the images that CaFo chooses on: those that a rival does}"""


def run_rival(trial: Trial, shared: SharedInputs, search: SearchConfig, folder: Path) -> TrialResult:
    """Run a rival's trial: write its classifier and result below `folder`; return the result.

    Raises:
        CafoError: the images lack what the method needs, or a loss is not finite.
    """
    started = time.monotonic()
    setting = trial.setting
    method, (source,) = shared.rivals[setting.rival], setting.encoders
    rows, unprojected = shared.few_shot[trial.shots, trial.seed], reads_unprojected(method)
    how = CHOSEN_ON[shared.select.get(trial.shots, "val")]
    chosen = fit_and_choose(
        method,
        few_shot_images(trial, shared, rows, unprojected=unprojected),
        how,
        val=validation_images(shared, source, unprojected=unprojected) if how == "val" else None,
        seed=trial.seed,
        folds=search.folds,
        rule=search.rule,
        estimate=how != "val" if search.estimate is None else search.estimate,
    )
    read = unprojected_source(source) if unprojected else source
    classifier = FewShotClassifier(
        name=setting.rival,
        method=method,
        fitted=chosen.fitted,
        setting=chosen.setting,
        class_names=shared.class_names,
        source=read,
        encoders={read: shared.identities[read]},
        images=tuple(shared.files[row] for row in rows) if shared.files else (),
        seed=trial.seed,
    )
    with atomic_path(folder / trial.name / RIVAL) as temporary:
        save_classifier(classifier, temporary)
    values = chosen_values(chosen) | {"keys": len(rows), "seconds": time.monotonic() - started}
    result = TrialResult.of(trial, "finished", [], **values)
    result.write(folder)
    return result


def validation_images(shared: SharedInputs, source: str, *, unprojected: bool = False) -> tuple[Features, Tensor]:
    """Return the features and labels of the validation images.

    Args:
        shared: the arrays of the sweep.
        source: the encoder.
        unprojected: whether what comes before its last projection is needed too.
    """
    return _features(lambda name: shared_tensor(shared.val[name]), source, unprojected), shared_tensor(
        shared.val_labels
    )


def few_shot_images(
    trial: Trial, shared: SharedInputs, rows: np.ndarray, *, unprojected: bool = False
) -> FewShotImages:
    """Return the labelled images of a trial, from their rows of the shared arrays.

    Args:
        trial: the trial.
        shared: the arrays of the sweep.
        rows: the images.
        unprojected: whether what comes before the encoder's last projection is needed too, and the projection.
    """
    setting = trial.setting
    (source,) = setting.encoders
    key = (source, setting.sentences)
    assert shared.plain_rows is not None
    plain, prompts = shared.plain_rows[rows], shared.prompts.get(key)
    projection = None
    if unprojected:
        weight, bias = shared.projections[source]
        projection = Projection(shared_tensor(weight), None if bias is None else shared_tensor(bias))
    return FewShotImages(
        views=_features(lambda name: torch.from_numpy(shared.views[name][: setting.views, rows]), source, unprojected),
        plain=_features(lambda name: torch.from_numpy(shared.plain[name][plain]), source, unprojected),
        labels=torch.from_numpy(shared.labels[rows]),
        classifier=shared_tensor(shared.classifiers[key]),
        prompts=None if prompts is None else shared_tensor(prompts),
        projection=projection,
    )


def _features(read: Callable[[str], Tensor], source: str, unprojected: bool) -> Features:
    """Return an encoder's features, of which `read` has those of a name."""
    return Features(embeddings=read(source), unprojected=read(unprojected_source(source)) if unprojected else None)


def chosen_values(chosen: Chosen) -> dict[str, Any]:
    """The values of a `TrialResult` that a rival has."""
    values: dict[str, Any] = {"select": chosen.how, "hyperparameters": json.dumps(dict(chosen.setting))}
    if chosen.correct is not None and chosen.total:
        accuracy = chosen.correct / chosen.total
        values |= {"correct": chosen.correct, "images": chosen.total, "accuracy": accuracy}
    if chosen.estimate is not None:
        estimate = chosen.estimate
        values |= {"estimate_correct": int(estimate.correct), "estimate_images": int(estimate.total)}
    return values
