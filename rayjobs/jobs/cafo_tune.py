"""Train CaFo's caches over a search space and choose the best settings, on validation images or without any.

The images are encoded once, and all trials share their features. Ray Tune runs a trial for every setting, K and seed;
each trains the cache keys and chooses α, β and the ensemble's weights on validation images or, without any, on training
images that it holds out (`search.select`). The same command resumes an interrupted sweep: trials that are finished are
not run again. Test images are opened by cafo-eval, not here.
"""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from cafo.choice_names import Select
from cafo.datasets import Dataset
from cafo.methods.base import reads_unprojected
from rayjobs.cluster.ray_init import connect
from rayjobs.config import to_dict
from rayjobs.console import show_table
from rayjobs.data.feature_store import FeatureStore, open_encoders, open_projection
from rayjobs.data.few_shot_images import FewShotPlan, encode_few_shot
from rayjobs.data.image_dataset import log_notices
from rayjobs.data.image_list import ImageList, plain_list
from rayjobs.data.rejected import write_rejected
from rayjobs.data.text_classifier import prepare_classifier
from rayjobs.errors import ConfigError, DataError
from rayjobs.job_configs.cafo_tune import Config
from rayjobs.lifecycle import job
from rayjobs.models.encoder import EncoderInfo
from rayjobs.reporting.tables import accuracy_cell
from rayjobs.runs.provenance import check_provenance, lock_provenance
from rayjobs.runs.record import write_result
from rayjobs.runs.run_dir import open_run
from rayjobs.storage.files import write_json, write_parquet
from rayjobs.tune.choice_tables import choice_tables, hurtful_notices
from rayjobs.tune.figures import write_search_surfaces
from rayjobs.tune.identity import check_same_classes, check_same_inputs
from rayjobs.tune.images import duplicate_notices
from rayjobs.tune.inputs import SweepInputs, share_inputs, write_few_shot
from rayjobs.tune.rivals import check_rivals, enumerate_rivals, open_rivals, reads_sentences
from rayjobs.tune.search_space import Setting, enumerate_settings, enumerate_trials
from rayjobs.tune.selection import (
    CHOSEN,
    SWEEP,
    ChosenSetting,
    best_choice,
    choose_settings,
    edge_notices,
    remove_other_caches,
)
from rayjobs.tune.sweep import TrialPool, run_sweep
from rayjobs.tune.trial import TrialResult


def settings_to_try(settings: Config) -> list[Setting]:
    """The settings of the search space. Raises ConfigError if there is nothing to search."""
    space, encoders, views = settings.space, list(settings.encoders), settings.features.views
    file = settings.data.prompts is not None
    tried = enumerate_settings(space, settings.search, encoders, views, file)
    tried += enumerate_rivals(space, encoders, views, file)
    settings.search.grid()
    if settings.search.select == "leave_one_out" and any(setting.epochs for setting in tried):
        raise ConfigError(
            "search.select=leave_one_out needs untrained keys, as trained ones have seen all images: give "
            "space.epochs=[0], or take crossfit"
        )
    if not enumerate_trials(settings.space, tried):
        raise ConfigError("the space holds no trial: K = K' = 0 leaves nothing to cache")
    return tried


def check(settings: Config) -> tuple[Dataset, list[Setting]]:
    """Check everything that can be checked before a worker starts; return the data set and the settings to try.

    Raises a UserError for the first problem.
    """
    dataset, tried = settings.data.open(), settings_to_try(settings)
    if len(dataset.class_names) < 2:
        raise DataError(f"{dataset.name} has one class, and a classifier needs two or more")
    if not dataset.val and (settings.search.select == "val" or settings.search.join_val):
        setting = "search.join_val" if settings.search.join_val else "search.select=val"
        raise DataError(
            f"{setting} needs validation images, and {dataset.name} has none; leave it out, or add a val list"
        )
    check_same_classes(settings.run.folder, dataset.class_names)
    choices = few_shot_plan(settings, dataset).choose()
    trials = enumerate_trials(settings.space, tried)
    check_rivals(open_rivals(settings.space), trials, choices, dataset.class_names)
    for kind in {setting.sentences for setting in tried}:
        settings.data.sentences(dataset, kind)
    settings.data.generated_images(dataset, max(setting.generated for setting in tried))
    return dataset, tried


def plan(settings: Config) -> None:
    """Show what `run` would do."""
    dataset, tried = check(settings)
    check_provenance(settings.run.folder / SWEEP, identity(settings), kind=Config)
    rows = [
        ["data set", f"{dataset.name}: {len(dataset.class_names)} classes, {len(dataset.val)} validation images"],
        ["chosen on", _describe_choices(select_by_shots(settings, dataset, tried))],
        ["encoders", ", ".join(f"{name} ({e.kind} {e.name})" for name, e in settings.encoders.items())],
        ["search", _describe_search(settings, tried)],
        *([["rivals", ", ".join(open_rivals(settings.space))]] if settings.space.rivals else []),
        ["shots", ", ".join(map(str, settings.space.shots))],
        ["seeds", ", ".join(map(str, settings.space.seeds))],
    ]
    show_table("plan", ["", ""], [*rows, *(["notice", notice] for notice in dataset.notices)])


@job
def run(settings: Config) -> dict[str, Any]:
    """Run the sweep and choose; return and write `result.json`.

    Beside it are `results.parquet` with a row per trial, `chosen.json`, and the chosen trials' caches in `trials/`.
    """
    dataset, tried = check(settings)
    encoders = open_used_encoders(settings, tried)  # one that cannot be loaded is told before Ray starts
    check_same_sweep(settings)
    folder = open_run(settings.run, settings)
    connect(folder, settings.run.cache_folder)
    pool = TrialPool(settings.trials.workers.max, settings.trials.resources(reserved_cpus=0))

    inputs = prepare_inputs(settings, dataset, tried, encoders)
    write_rejected(folder, (image._asdict() for image in inputs.rejected))
    check_same_inputs(folder, inputs)
    write_few_shot(folder, inputs)
    select = select_by_shots(settings, dataset, tried)
    shared, counts = share_inputs(inputs, select), inputs.counts()
    notices = [*dataset.notices, *duplicate_notices(inputs.readable_images()), *inputs.notices()]
    del inputs  # a second copy of the features

    results = run_sweep(settings.space, tried, shared, settings.search, folder / "trials", pool)
    write_parquet(folder / "results.parquet", pa.Table.from_pylist([vars(result) for _, result in results]))

    chosen = choose_settings(results, settings.search.compare)
    remove_other_caches(folder, chosen)
    write_search_surfaces(folder, chosen, shared, settings.search)
    write_json(
        folder / CHOSEN,
        {"chosen_on": _describe_choices(select), "chosen": [choice.to_json() for choice in chosen]},
    )
    notices += [*edge_notices(chosen, settings.search), *hurtful_notices(results, chosen)]
    tables = choice_tables(results, chosen)
    result = {
        **summarize(dataset, chosen, [result for _, result in results]),
        **tables,
        **counts,
        **log_notices(notices),
    }
    write_result(folder, result)
    for name, rows in tables.items():
        show_table(f"{settings.run.name}: {name}", list(rows[0]), [list(row.values()) for row in rows])
    return result


def select_by_shots(settings: Config, dataset: Dataset, tried: list[Setting]) -> dict[int, Select]:
    """Return the images that the choices at each K are made on."""
    has_val, trained = bool(dataset.val), any(setting.epochs for setting in tried)
    search = settings.search
    return {shots: search.select_at(shots, has_val=has_val, trained=trained) for shots in settings.space.shots}


def check_same_sweep(settings: Config) -> None:
    """Record the settings of the run folder's sweep. Raises ProvenanceError if the folder has a sweep of others."""
    lock_provenance(settings.run.folder / SWEEP, identity(settings), kind=Config)


def identity(settings: Config) -> dict[str, Any]:
    """Return the settings that the trials and the choice depend on."""
    return {name: value for name, value in to_dict(settings).items() if name not in ("run", "trials", "scale")}


def few_shot_plan(settings: Config, dataset: Dataset) -> FewShotPlan:
    """The few-shot choices that the sweep makes."""
    space, joined = settings.space, dataset.val if settings.search.join_val else ()
    return FewShotPlan(
        dataset=dataset, shots=space.shots, seeds=space.seeds, short=settings.data.short_classes, joined=joined
    )


def open_used_encoders(settings: Config, tried: list[Setting]) -> dict[str, EncoderInfo]:
    """Load the encoders that the settings need, to learn their identities. Raises EncoderError."""
    used = dict.fromkeys(name for setting in tried for name in setting.encoders)
    return open_encoders({name: settings.encoders[name] for name in used}, _unprojected(settings, tried))


def _unprojected(settings: Config, tried: list[Setting]) -> set[str]:
    """The encoders of whose features a rival reads those before the last projection too."""
    rivals = open_rivals(settings.space)
    return {setting.encoders[0] for setting in tried if setting.rival and reads_unprojected(rivals[setting.rival])}


def prepare_inputs(
    settings: Config,
    dataset: Dataset,
    tried: list[Setting],
    encoders: Mapping[str, EncoderInfo],
    *,
    plain: bool = False,
) -> SweepInputs:
    """Choose the few-shot images, encode all images and descriptions that the settings need; reuse what is cached.

    Args:
        encoders: those of `open_used_encoders`.
        plain: encode the training images as they are too, whether the choices need it or not.
    """
    data, cache, resources = settings.data, settings.run.cache_folder, settings.scale.resources()
    generated = {count: data.generated_images(dataset, count) for count in {setting.generated for setting in tried}}
    rivals = open_rivals(settings.space)
    of_rivals = [(setting, rivals[setting.rival]) for setting in tried if setting.rival]
    root, most_generated = generated[max(generated)]
    views = settings.features.views
    others = [ImageList(role="generated", root=root, items=most_generated, views=views)]
    made_on = set(select_by_shots(settings, dataset, tried).values())
    if "val" in made_on:
        others.append(plain_list("val", dataset.image_root, dataset.val))
    store = FeatureStore(
        encoders=encoders,
        settings=settings.features,
        cache=cache,
        workers=settings.scale.workers.max,
        resources=resources,
    )
    plain = plain or bool(rivals) or made_on != {"val"}
    images = encode_few_shot(store, few_shot_plan(settings, dataset), views, others, plain=plain)
    read_each = {(setting.encoders[0], setting.sentences) for setting, method in of_rivals if reads_sentences(method)}
    classifiers = {
        (name, kind): prepare_classifier(
            encoders[name],
            data.sentences(dataset, kind),
            dataset.class_names,
            cache,
            resources,
            each=(name, kind) in read_each,
        )
        for name, kind in {(setting.encoders[0], setting.sentences) for setting in tried}
    }
    return SweepInputs(
        dataset=dataset,
        images=images,
        generated={count: items for count, (_, items) in sorted(generated.items())},
        classifiers=classifiers,
        identities={name: encoder.identity for name, encoder in encoders.items()},
        rivals=rivals,
        projections={name: open_projection(name, encoders[name]) for name in sorted(_unprojected(settings, tried))},
    )


def summarize(dataset: Dataset, chosen: list[ChosenSetting], results: list[TrialResult]) -> dict[str, Any]:
    """The figures of `result.json`."""
    best = best_choice(chosen)
    at, estimate = f"with {best.method} at {best.shots} shots", best.estimate()
    if estimate is not None:
        headline = f"estimated accuracy {estimate} {at}"
    elif best.accuracy is not None:
        images = {result.trial: result.images for result in results}
        accuracies = [seed.accuracy for seed in best.seeds if seed.accuracy is not None]
        headline = f"{accuracy_cell(accuracies, images.get(best.seeds[0].trial), unit='%')} on val {at}"
    else:
        headline = f"{best.method} at {best.shots} shots, with the expected α and β: no image was held out"
    figures: dict[str, Any] = {"headline": headline, "data_set": dataset.name}
    if best.accuracy is not None:
        name = "val_accuracy" if best.select == "val" else "held_out_accuracy"
        zero_shot = [r.zero_shot_accuracy for r in results if r.zero_shot_accuracy is not None]
        figures |= {name: round(100 * best.accuracy, 2), f"zero_shot_{name}": round(100 * max(zero_shot), 2)}
    if estimate is not None:
        low, high = estimate.interval
        figures |= {"estimated_accuracy": round(100 * estimate.accuracy, 2)}
        figures |= {"estimate_low": round(100 * low, 2), "estimate_high": round(100 * high, 2)}
    return {
        **figures,
        "trials": len(results),
        "stopped_early": sum(result.status == "stopped" for result in results),
    }


def _describe_choices(select: Mapping[int, Select]) -> str:
    """Describe the images that choices are made on, with the K of each if they differ."""
    if len(set(select.values())) == 1:
        return next(iter(select.values()))
    kinds = {how: [str(shots) for shots, other in select.items() if other == how] for how in select.values()}
    return "; ".join(f"{how} at K={', '.join(shots)}" for how, shots in kinds.items())


def _describe_search(settings: Config, tried: list[Setting]) -> str:
    search, trials = settings.search, len(enumerate_trials(settings.space, tried))
    if search.method == "optuna":
        own = sum(not setting.rival for setting in tried)
        return f"optuna: {search.samples} suggestions for every K, of {own} settings, each over all seeds"
    return f"{search.method}: {trials} trials" + (", fewer where stopped" if search.method == "asha" else "")
