"""Run Ray Tune: one experiment, whose state is removed when it ends. Results are the trials' own files."""

import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray import tune

from rayjobs.storage.paths import remove_folder


def run_tuner(
    trainable: Callable[..., Any],
    param_space: dict[str, Any] | None,
    folder: Path,
    tune_config: tune.TuneConfig,
    callback: tune.Callback,
) -> Sequence[BaseException]:
    """Run an experiment to its end and return its trials' errors. A trial that fails is not run again.

    Args:
        trainable: a function with its resources.
        param_space: the trials' configs; None if `tune_config` has a search algorithm.
        folder: where Tune keeps the experiment's state while it runs.
        callback: called at the end of every trial.
    """
    experiment = folder / uuid.uuid4().hex[:8]
    run_config = tune.RunConfig(
        name=experiment.name,
        storage_path=str(folder),
        verbose=0,
        callbacks=[callback],
    )
    try:
        tuner = tune.Tuner(trainable, param_space=param_space, tune_config=tune_config, run_config=run_config)
        return tuner.fit().errors
    finally:
        with suppress(OSError):
            remove_folder(experiment)
