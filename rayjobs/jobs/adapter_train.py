"""Train an adapter on a frozen LLaMA: tokenize the records, train with Ray Train and DeepSpeed, write the adapter file.

With a `vision` section, records may have images: a frozen encoder reads them, and a small projection that is trained
with the adapter adds them to its prompts.

The same command resumes an interrupted run with as many workers as there are then. A finished run is not trained again.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from adapter.adapter_file import AdapterFile, extract_adapter, put_tensors
from adapter.base.binding import meta_decoder
from adapter.base.checkpoint import Checkpoint
from adapter.base.memory import base_bytes
from adapter.base.quantization import PRECISIONS
from adapter.decoder_config import DecoderConfig
from adapter.methods.base import AdapterMethod
from adapter.templates import Template
from rayjobs.cluster.device import default_device
from rayjobs.cluster.ray_init import connect
from rayjobs.config import to_dict
from rayjobs.console import show_result, show_table
from rayjobs.data.image_features import prepare_image_source
from rayjobs.data.image_source import ImageSource, StreamedImages
from rayjobs.data.records import check_sources, set_names
from rayjobs.data.templates import describe_sources, header_templates, source_templates
from rayjobs.data.token_store import IMAGE_LISTS, TokenStore, prepare_tokens
from rayjobs.data.trained_records import trained_digests, write_digests
from rayjobs.errors import ConfigError, DataError, NonFiniteLossError
from rayjobs.job_configs.adapter_train import Config
from rayjobs.lifecycle import job
from rayjobs.models.base_model import BaseModelConfig, open_tokenizer
from rayjobs.models.image_conditioning import ImageConditioning
from rayjobs.runs.provenance import Change
from rayjobs.runs.record import RESULT_FILE, write_result
from rayjobs.runs.run_dir import open_run
from rayjobs.storage.files import atomic_path, read_object
from rayjobs.storage.hub_model import ADAPTER_FILE, TRAINED_RECORDS_FILE, format_bytes
from rayjobs.storage.paths import resolve_path
from rayjobs.train.engine import check_zero
from rayjobs.train.estimate import TrainingPlan, describe_cost, sample_examples
from rayjobs.train.resume_check import check_same_run, drop_keys, lock_run, record_nonfinite_loss
from rayjobs.train.start_times import StartTimes
from rayjobs.train.summary import summarize
from rayjobs.train.train_job import TrainJob
from rayjobs.train.trainer import fit

logger = logging.getLogger(__name__)


FREE_TO_CHANGE = (
    "run",
    "scale",
    "zero",
    "data.max_rejected_fraction",
    "train.token_budget",
    "train.checkpoint_activations",
    "train.checkpoint_every_s",
    "train.checkpoint_every_steps",
    "vision.batch",
)
"""Settings that do not change the result, so a run may be resumed with other values of them."""


class Inputs(NamedTuple):
    """Inputs of a run besides the records, opened and checked."""

    checkpoint: Checkpoint
    """The base."""
    tokenizer: Path
    conditioning: ImageConditioning | None
    """The image encoder; None without a `vision` section."""
    templates: list[Template]
    """The template of each source of `data.all_sources()`."""


def check(settings: Config, *, weights: bool = True) -> Inputs:
    """Check everything that can be checked before a worker starts. Raises a UserError for the first problem.

    weights: False to leave the weights of a base on the hub there.
    """
    inputs = open_inputs(settings, weights=weights)
    check_fit(settings, inputs)
    adapter = build_adapter(settings, inputs)
    for doubt in (
        settings.train.describe_short_warmup(),
        settings.optimizer.describe_default_rate(adapter.method, adapter.usual_lr),
    ):
        if doubt:
            logger.warning("%s", doubt)
    return inputs


def open_inputs(settings: Config, *, weights: bool = True) -> Inputs:
    """Open the base, the tokenizer, the records and the image encoder. Raises a UserError if one cannot be used.

    weights: False to leave the weights of a base on the hub there.
    """
    checkpoint, tokenizer = settings.base.open(weights=weights)
    sources = settings.data.all_sources()
    check_sources(sources)
    templates = source_templates(sources, open_tokenizer(tokenizer))
    return Inputs(checkpoint, tokenizer, settings.vision.open() if settings.vision else None, templates)


def check_fit(settings: Config, inputs: Inputs) -> list[Change]:
    """Check that adapter, sequences and ZeRO fit the base, and that the run folder has no other run.

    Returns what differs from the run in that folder that may nevertheless go on in it; nothing if the base has no
    weights, by which a run is identified. Raises ConfigError for what does not fit, ProvenanceError for another run.
    """
    check_zero(settings.zero, settings.base.dtype)
    layers, window = inputs.checkpoint.config.n_layers, inputs.checkpoint.config.max_seq_len
    if (settings.adapter.n_layers or 0) > layers:
        raise ConfigError(
            f"adapter.n_layers is {settings.adapter.n_layers}, but {settings.base.path} has {layers} layers"
        )
    adapter = build_adapter(settings, inputs)
    adapter.check(inputs.checkpoint.config)
    adapter.check_precision(settings.base.dtype)
    if settings.data.max_length > window:
        raise ConfigError(
            f"data.max_length is {settings.data.max_length}, more than the window of {settings.base.path}, {window} "
            "tokens: lower it"
        )
    if not inputs.checkpoint.has_weights:
        return []
    return check_same_run(settings.run.folder, settings, identify(settings, inputs), FREE_TO_CHANGE)


def build_adapter(settings: Config, inputs: Inputs) -> AdapterMethod:
    """The adapter to train, with the projection of its images. Raises AdapterError for settings that do not fit."""
    projection = inputs.conditioning and inputs.conditioning.projection
    return settings.adapter.build(inputs.checkpoint.config.n_layers, projection)


def identify(settings: Config, inputs: Inputs) -> dict[str, Any]:
    """Return what a run's result depends on: its settings, with the content of what they name in place of its path."""
    values = drop_keys(to_dict(settings), FREE_TO_CHANGE)
    values["base"] |= {
        "path": inputs.checkpoint.fingerprint()[:16],
        "tokenizer": open_tokenizer(inputs.tokenizer).fingerprint[:16],
    }
    sources = zip(settings.data.all_sources(), inputs.templates, strict=True)
    with_images, trained = inputs.conditioning is not None, len(settings.data.path)
    identities = [source.identity(template, with_images=with_images) for source, template in sources]
    values["data"] = drop_keys(values["data"], ("format", "columns", "template")) | {
        "path": identities[:trained],
        "val_path": identities[trained:],
    }
    if inputs.conditioning is not None:
        values["vision"]["encoder"] = inputs.conditioning.encoder.identity
    return values


def plan(settings: Config) -> None:
    """Show what `run` would do."""
    checkpoint, _, conditioning, templates = inputs = check(settings, weights=False)
    sources, train, shape = settings.data.sources(), settings.train, checkpoint.config
    usable = [Counter(bool(row["image"]) for row in source.read() if "rejected" not in row) for source in sources]
    per_epoch = sum(round(source.weight * count.total()) for source, count in zip(sources, usable, strict=True))
    if settings.vision and conditioning:
        images = f"{sum(len(source.image_paths()) for source in sources):,}, {settings.vision.mode}"
    else:
        images = _describe_left_out(sum(count[True] for count in usable))
    adapter = build_adapter(settings, inputs)
    model = meta_decoder(shape, adapter)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    base = f"{settings.base.path}: {shape.n_layers} layers of width {shape.dim}, held in {settings.base.dtype}"
    steps_per_epoch = -(-per_epoch // train.global_batch)
    steps, warmup = train.total_steps(steps_per_epoch), train.warmup_steps(steps_per_epoch)
    rows = [
        ["base", base],
        *_describe_missing_weights(settings.base, checkpoint),
        ["memory of the base", _describe_memory(shape)],
        ["adapter", adapter.describe()],
        ["trainable parameters", f"{trainable:,}"],
        ["records", describe_sources(sources, templates)],
        ["records in an epoch", f"{per_epoch:,}, less what is held out for validation"],
        ["images", images],
        ["steps", f"{steps:,} of {train.global_batch} records"],
        ["peak learning rate", f"{settings.optimizer.peak_lr(train.global_batch):.3g}, after {warmup:,.0f} steps"],
        ["workers", f"{settings.scale.workers} under ZeRO-{settings.zero.stage}"],
        *_estimate_cost(settings, inputs, steps),
        ["run folder", str(settings.run.folder)],
    ]
    show_table("plan", ["", ""], rows)


@job
def run(settings: Config) -> dict[str, Any]:
    """Train or resume; return and write `result.json`, with `adapter.safetensors` and `metrics.jsonl` beside it."""
    times = StartTimes(settings.JOB)
    inputs = check(settings)
    folder = settings.run.folder
    if not (folder / RESULT_FILE).exists():
        lock_run(folder, settings, identify(settings, inputs), FREE_TO_CHANGE)
        open_run(settings.run, settings)
        times.end("importing and checking")
        train(settings, inputs, times)
    result = read_object(folder / RESULT_FILE)
    show_result(settings.run.name, result)
    return result


def train(settings: Config, inputs: Inputs, times: StartTimes) -> None:
    """Train to the last step, and write the adapter and the result. times: what was needed so far."""
    folder = settings.run.folder
    connect(folder, settings.run.cache_folder)
    settings.scale.resources()  # workers that can never run are refused before anything is tokenized
    times.end("starting Ray")
    store, images = prepare_inputs(settings, inputs, folder)
    write_digests(folder / TRAINED_RECORDS_FILE, trained_digests(settings.data))
    job = train_job(settings, inputs, store, images)
    try:
        times.end("reading the records")
        trained = fit(job, settings.scale, folder, settings.run.track, times)
    except NonFiniteLossError as error:
        record_nonfinite_loss(folder, error)
        raise
    file = adapter_file(settings, job, trained, inputs)
    with atomic_path(folder / ADAPTER_FILE) as temporary:
        file.save(temporary)
    write_result(
        folder,
        {
            **summarize(folder, job, file, with_images=settings.vision is not None),
            "seconds_to_first_step": times.seconds,
        },
    )


def prepare(settings: Config) -> None:
    """Make the tokens and image features that a run will read, unless they exist."""
    inputs = check(settings)
    connect(settings.run.cache_folder)
    prepare_inputs(settings, inputs)


def prepare_inputs(settings: Config, inputs: Inputs, run: Path | None = None) -> tuple[TokenStore, ImageSource | None]:
    """The tokens of the records and the source of their images, made unless they exist.

    run: the run folder, into which the list of rejected records is copied.
    """
    data, cache, conditioning = settings.data, settings.run.cache_folder, inputs.conditioning
    preprocess = conditioning and conditioning.encoder.preprocess
    store = prepare_tokens(data, inputs.tokenizer, cache, preprocess=preprocess, run=run)
    if store.images_left_out:
        logger.info("images: %s", _describe_left_out(store.images_left_out))
    if not store.rows("train"):
        raise DataError("no record is left to train on: lower data.val_fraction, or give more records")
    if settings.vision is None or conditioning is None:
        return store, None
    images = prepare_image_source(
        settings.vision,
        conditioning,
        data.all_sources(),
        resolve_path(store.folder) / IMAGE_LISTS,
        cache,
        settings.scale,
        settings.train.seed,
    )
    return store, images


def train_job(settings: Config, inputs: Inputs, store: TokenStore, images: ImageSource | None) -> TrainJob:
    """Everything that the training workers need."""
    conditioning = inputs.conditioning
    return TrainJob(
        base=settings.base.path,
        dtype=settings.base.dtype,
        adapter=build_adapter(settings, inputs),
        store=store,
        weights=tuple(source.weight for source in settings.data.sources()),
        sets=tuple(set_names(settings.data.all_sources())),
        images=images,
        encoder=conditioning.encoder if isinstance(images, StreamedImages) and conditioning else None,
        train=settings.train,
        optimizer=settings.optimizer,
        zero=settings.zero,
    )


def adapter_file(settings: Config, job: TrainJob, trained: Mapping[str, Tensor], inputs: Inputs) -> AdapterFile:
    """The trained parameters as an adapter file for this base, tokenizer and template."""
    model = meta_decoder(inputs.checkpoint.config, job.adapter)
    for part in model.adapter_modules:  # which may hold fixed values besides the trained ones
        part.to_empty(device="cpu")
        part.reset_parameters()
    put_tensors(model, {name: trained[name] for name, one in model.adapter_parameters() if one.requires_grad})
    sources = settings.data.sources()
    template, format_templates = header_templates(sources, inputs.templates[: len(sources)])
    return extract_adapter(
        model,
        base_fingerprint=inputs.checkpoint.fingerprint(),
        base_dtype=job.dtype,
        tokenizer_sha256=open_tokenizer(inputs.tokenizer).sha256,
        template=template,
        format_templates=format_templates,
    )


def _describe_missing_weights(base: BaseModelConfig, checkpoint: Checkpoint) -> list[list[str]]:
    if to_fetch := base.bytes_to_fetch():
        return [["to fetch from the hub", format_bytes(to_fetch)]]
    return [] if checkpoint.has_weights else [["weights", "missing: only the shape is known"]]


def _estimate_cost(settings: Config, inputs: Inputs, steps: int) -> list[list[str]]:
    """Rows of the plan about the memory of a worker and the time, by a probe on this machine."""
    data, train, workers = settings.data, settings.train, settings.scale.workers.max
    sources = data.sources()
    templates, tokenizer = inputs.templates[: len(sources)], open_tokenizer(inputs.tokenizer)
    examples = sample_examples(sources, templates, tokenizer, data.max_length)
    if not examples:
        return []
    costed = TrainingPlan(
        shape=inputs.checkpoint.config,
        adapter=build_adapter(settings, inputs),
        dtype=settings.base.dtype,
        token_budget=train.token_budget,
        global_batch=train.global_batch,
        workers=workers,
        zero_stage=settings.zero.stage,
        threads=settings.scale.threads_per_worker,
        checkpoint_activations=train.checkpoint_activations,
    )
    return describe_cost(costed, examples, steps, default_device(), images=inputs.conditioning is not None)


def _describe_memory(config: DecoderConfig) -> str:
    sizes = {name: base_bytes(config, *precision) for name, precision in PRECISIONS.items()}
    return ", ".join(f"{format_bytes(size)} in {name}" for name, size in sizes.items())


def _describe_left_out(images: int) -> str:
    return f"left out, of {images:,} records: there is no vision section" if images else "none"
