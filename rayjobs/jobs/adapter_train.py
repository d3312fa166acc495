"""Train an adapter on a frozen LLaMA: tokenize the records, train with Ray Train and DeepSpeed, write the adapter file.

With a `vision` section, records may have images: a frozen encoder reads them, and a small projection that is trained
with the adapter adds them to its prompts.

The same command resumes an interrupted run with as many workers as there are then. A finished run is not trained again.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from adapter.adapter_file import AdapterFile, extract_adapter
from adapter.adaption import AdaptionConfig, Gate
from adapter.base_checkpoint import Checkpoint, meta_llama
from adapter.image_projection import ImageProjectionConfig
from adapter.tokenizer import Tokenizer
from rayjobs.cluster.ray_init import connect
from rayjobs.config import config, to_dict
from rayjobs.console import show_result, show_table
from rayjobs.data.image_features import prepare_image_source
from rayjobs.data.image_source import ImageSource, StreamedImages
from rayjobs.data.records import DataConfig
from rayjobs.data.token_store import IMAGE_LISTS, TokenStore, prepare_tokens
from rayjobs.errors import ConfigError, DataError, ProvenanceError
from rayjobs.lifecycle import job
from rayjobs.models.base_model import BaseModelConfig
from rayjobs.models.image_conditioning import ImageConditioning, VisionConfig
from rayjobs.runs.provenance import normalize_paths
from rayjobs.runs.run_dir import RunConfig, open_run
from rayjobs.storage.download import cached_path
from rayjobs.storage.files import atomic_path, read_json, read_jsonl, write_json
from rayjobs.storage.paths import resolve_path
from rayjobs.storage.yaml_file import read_yaml
from rayjobs.train.config import ScaleConfig, TrainConfig, TrainJob
from rayjobs.train.engine import OptimizerConfig, ZeroConfig
from rayjobs.train.trainer import fit

logger = logging.getLogger(__name__)


@config
class AdapterConfig:
    """The adapter's shape."""

    n_layers: int = Field(default=30, ge=1)
    """L: number of adapted layers, counted from the top."""
    prompt_length: int = Field(default=10, ge=1)
    """K: number of prompt tokens in each adapted layer."""
    attention: Literal["zero-init", "rand-init", "prefix"] = "zero-init"
    """Attention to the prompts: `zero-init` is the paper's method; its ablations are `rand-init`, whose gate is fixed
    at 1, and `prefix`, an ordinary prefix that shares one softmax with the words."""

    def adaption(self, vision: ImageProjectionConfig | None) -> AdaptionConfig:
        gates: dict[str, Gate] = {"zero-init": "tanh", "rand-init": "one", "prefix": "prefix"}
        return AdaptionConfig(
            n_layers=self.n_layers, prompt_length=self.prompt_length, gate=gates[self.attention], vision=vision
        )


@config
class Config:
    JOB: ClassVar = "adapter-train"

    base: BaseModelConfig
    data: DataConfig
    adapter: AdapterConfig = AdapterConfig()
    vision: VisionConfig | None = None
    """Image encoder and projection; null leaves the records' images out."""
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    zero: ZeroConfig = ZeroConfig()
    scale: ScaleConfig = ScaleConfig()
    run: RunConfig


FREE_TO_CHANGE = ("run", "scale", "zero")
"""Sections that do not change the result, so a run may be resumed with other values of them."""


def check(settings: Config) -> tuple[Checkpoint, Path, ImageConditioning | None]:
    """Check everything that can be checked before a worker starts; return the base's checkpoint, the tokenizer's path
    and the image encoder. Raises a UserError for the first problem."""
    checkpoint, tokenizer = settings.base.open()
    check_fit(settings, checkpoint)
    for source in [*settings.data.sources(), *settings.data.val_sources()]:
        next(iter(source.read()), None)
    return checkpoint, tokenizer, settings.vision.open() if settings.vision else None


def check_fit(settings: Config, checkpoint: Checkpoint) -> None:
    """Raise ConfigError unless the adapter fits the base, ProvenanceError if the folder has a run of other settings."""
    if settings.adapter.n_layers > checkpoint.config.n_layers:
        raise ConfigError(
            f"adapter.n_layers is {settings.adapter.n_layers}, but {settings.base.path} has "
            f"{checkpoint.config.n_layers} layers"
        )
    saved = settings.run.folder / "config.yaml"
    if saved.exists():
        before, now = normalize_paths(read_yaml(saved)), normalize_paths(to_dict(settings))
        changed = [name for name in now if name not in FREE_TO_CHANGE and now[name] != before.get(name)]
        if changed:
            raise ProvenanceError(
                f"{saved.parent} holds a run with other settings in {', '.join(changed)}: "
                "give this one another run.name, or remove that folder"
            )


def plan(settings: Config) -> None:
    """Show what `run` would do."""
    checkpoint, _, conditioning = check(settings)
    sources, train, shape = settings.data.sources(), settings.train, checkpoint.config
    records = [(source, list(source.read())) for source in sources]
    per_epoch = sum(round(source.weight * len(rows)) for source, rows in records)
    if settings.vision and conditioning:
        images = f"{sum(len(source.image_paths()) for source in sources):,}, {settings.vision.mode}"
    else:
        images = _describe_left_out(sum(bool(record["image"]) for _, rows in records for record in rows))
    model = meta_llama(shape)
    model.add_adapter(settings.adapter.adaption(conditioning and conditioning.projection))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    base = f"{settings.base.path}: {shape.n_layers} layers of width {shape.dim}, held in {settings.base.dtype}"
    steps = train.total_steps(-(-per_epoch // train.global_batch))
    rows = [
        ["base", base],
        ["trainable parameters", f"{trainable:,}"],
        ["records in an epoch", f"{per_epoch:,}, less what is held out for validation"],
        ["images", images],
        ["steps", f"{steps:,} of {train.global_batch} records"],
        ["peak learning rate", f"{settings.optimizer.base_lr * train.global_batch / 256:.3g}"],
        ["workers", f"{settings.scale.workers} under ZeRO-{settings.zero.stage}"],
        ["run folder", str(settings.run.folder)],
    ]
    show_table("plan", ["", ""], rows)


@job
def run(settings: Config) -> dict[str, Any]:
    """Train or resume; return and write `result.json`, with `adapter.safetensors` and `metrics.jsonl` beside it."""
    checkpoint, tokenizer, conditioning = check(settings)
    folder = settings.run.folder
    if not (folder / "result.json").exists():
        open_run(settings.run, settings)
        connect(folder, settings.run.cache_folder)
        settings.scale.resources()  # workers that can never run are refused before anything is tokenized
        store, images = prepare_inputs(settings, tokenizer, conditioning, folder)
        job = train_job(settings, conditioning, store, images)
        trained = fit(job, settings.scale, folder, settings.run.track)
        file = adapter_file(job.adaption, trained, checkpoint, tokenizer)
        with atomic_path(folder / "adapter.safetensors") as temporary:
            file.save(temporary)
        write_json(folder / "result.json", summarize(settings, job, file))
    result = read_json(folder / "result.json")
    show_result(settings.run.name, result)
    return result


def prepare(settings: Config) -> None:
    """Make the tokens and image features that a run will read, unless they exist."""
    _, tokenizer, conditioning = check(settings)
    connect(settings.run.cache_folder)
    prepare_inputs(settings, tokenizer, conditioning)


def prepare_inputs(
    settings: Config, tokenizer: Path, conditioning: ImageConditioning | None, run: Path | None = None
) -> tuple[TokenStore, ImageSource | None]:
    """The tokens of the records and the source of their images, made unless they exist.

    run: the run folder, into which the list of rejected records is copied.
    """
    data, cache = settings.data, settings.run.cache_folder
    preprocess = conditioning and conditioning.encoder.preprocess
    store = prepare_tokens(data, tokenizer, cache, preprocess=preprocess, run=run)
    if store.images_left_out:
        logger.info("images: %s", _describe_left_out(store.images_left_out))
    if not store.rows("train"):
        raise DataError("no record is left to train on: lower data.val_fraction, or give more records")
    if settings.vision is None or conditioning is None:
        return store, None
    images = prepare_image_source(
        settings.vision,
        conditioning,
        [*data.sources(), *data.val_sources()],
        resolve_path(store.folder) / IMAGE_LISTS,
        cache,
        settings.scale,
        settings.train.seed,
    )
    return store, images


def train_job(
    settings: Config, conditioning: ImageConditioning | None, store: TokenStore, images: ImageSource | None
) -> TrainJob:
    """Everything that the training workers need."""
    return TrainJob(
        base=str(resolve_path(settings.base.path)),
        dtype=settings.base.dtype,
        adaption=settings.adapter.adaption(conditioning and conditioning.projection),
        store=store,
        weights=tuple(source.weight for source in settings.data.sources()),
        images=images,
        encoder=conditioning.encoder if isinstance(images, StreamedImages) and conditioning else None,
        train=settings.train,
        optimizer=settings.optimizer,
        zero=settings.zero,
    )


def adapter_file(
    adaption: AdaptionConfig, trained: Mapping[str, Tensor], checkpoint: Checkpoint, tokenizer: Path
) -> AdapterFile:
    """The trained parameters as an adapter file for this base and tokenizer."""
    model = meta_llama(checkpoint.config)
    model.add_adapter(adaption)
    model.reset_adapter(None, "cpu")
    with torch.no_grad():
        for name, parameter in model.adapter_parameters():
            if parameter.requires_grad:
                parameter.copy_(trained[name])
    sha256 = Tokenizer(cached_path(tokenizer)).sha256
    return extract_adapter(model, base_fingerprint=checkpoint.fingerprint, tokenizer_sha256=sha256)


def summarize(settings: Config, job: TrainJob, file: AdapterFile) -> dict[str, Any]:
    """The figures of `result.json`."""
    folder, store = settings.run.folder, job.store
    rows = read_jsonl(folder / "metrics.jsonl")
    losses, val_losses = ([row[name] for row in rows if name in row] for name in ("loss", "val_loss"))
    headline = f"training loss {losses[-1]:.3f}"
    if val_losses:
        headline = f"held-out loss {val_losses[0]:.3f} → {val_losses[-1]:.3f}"
    return {
        "headline": headline,
        "adapter": str(folder / "adapter.safetensors"),
        "trainable_parameters": file.trainable,
        "steps": job.total_steps,
        "train_records": store.rows("train"),
        "val_records": store.rows("val"),
        **({"train_records_with_image": store.images("train")} if settings.vision else {}),
        "rejected_records": store.rejected,
        "train_loss": round(losses[-1], 5),
        "base_val_loss": round(val_losses[0], 5) if val_losses else None,
        "val_loss": round(val_losses[-1], 5) if val_losses else None,
    }


def _describe_left_out(images: int) -> str:
    return f"left out, of {images:,} records: there is no vision section" if images else "none"
