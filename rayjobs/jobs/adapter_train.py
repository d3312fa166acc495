"""Trains adaption prompts on a frozen LLaMA: records → token store → Ray Train under ZeRO → adapter.safetensors.

With `vision`, records may have images: a frozen encoder reads them, and a small projection learns to put them into the
prompts.

The same command resumes a run that was cut off, with as many workers as are there then; a finished run is shown again.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from adapter.adapter_file import extract_adapter
from adapter.adaption import AdaptionConfig, Gate
from adapter.base_checkpoint import Checkpoint, meta_llama
from adapter.image_projection import ImageProjectionConfig as Projected
from adapter.tokenizer import Tokenizer
from rayjobs.cluster.ray_init import connect
from rayjobs.config import config, to_dict
from rayjobs.console import show_result, show_table
from rayjobs.data.image_features import prepare_image_source
from rayjobs.data.image_source import ImageSource, StreamedImages
from rayjobs.data.records import DataConfig
from rayjobs.data.token_store import IMAGE_LISTS, TokenStore, prepare_tokens
from rayjobs.errors import UserError
from rayjobs.lifecycle import job
from rayjobs.models.base_model import BaseModelConfig
from rayjobs.models.image_conditioning import ImageConditioning, VisionConfig
from rayjobs.runs.provenance import normalize_paths
from rayjobs.runs.run_dir import RunConfig, open_run
from rayjobs.storage.files import atomic_path, read_json, read_jsonl, write_json
from rayjobs.storage.download import cached_path
from rayjobs.storage.yaml_file import read_yaml
from rayjobs.storage.paths import resolve_path
from rayjobs.train.config import ScaleConfig, TrainConfig, TrainJob
from rayjobs.train.engine import OptimizerConfig, ZeroConfig
from rayjobs.train.trainer import fit


@config
class AdapterConfig:
    """The adapter's shape."""

    n_layers: int = Field(default=30, ge=1)
    """L, adapted layers, counted from the top."""
    prompt_length: int = Field(default=10, ge=1)
    """K, prompt tokens in each adapted layer."""
    attention: Literal["zero-init", "rand-init", "prefix"] = "zero-init"
    """zero-init, the method; the paper's ablations: rand-init, its gate fixed at 1, and an ordinary prefix, which
    shares one softmax with the words."""

    def adaption(self, vision: Projected | None) -> AdaptionConfig:
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
    """How images are read; null leaves them out."""
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    zero: ZeroConfig = ZeroConfig()
    scale: ScaleConfig = ScaleConfig()
    run: RunConfig


FREE_TO_CHANGE = ("run", "scale", "zero")
"""Sections that do not change the result, so that a run may resume under others."""


def check(settings: Config) -> tuple[Checkpoint, Path, ImageConditioning | None]:
    """Everything that can be told before a worker starts. Raises ValueError."""
    checkpoint, tokenizer = settings.base.open()
    check_fit(settings, checkpoint)
    for source in [*settings.data.sources(), *settings.data.val_sources()]:
        next(iter(source.read()), None)
    return checkpoint, tokenizer, settings.vision.open() if settings.vision else None


def check_fit(settings: Config, checkpoint: Checkpoint) -> None:
    """That the adapter fits the base, and the run its folder. Raises ValueError."""
    if settings.adapter.n_layers > checkpoint.config.n_layers:
        raise UserError(
            f"adapter.n_layers is {settings.adapter.n_layers}, but {settings.base.path} has "
            f"{checkpoint.config.n_layers} layers"
        )
    saved = settings.run.folder / "config.yaml"
    if saved.exists():
        before, now = normalize_paths(read_yaml(saved)), normalize_paths(to_dict(settings))
        changed = [name for name in now if name not in FREE_TO_CHANGE and now[name] != before.get(name)]
        if changed:
            raise UserError(
                f"{saved.parent} holds a run with other settings in {', '.join(changed)}: "
                "give this one another run.name, or remove that folder"
            )


def plan(settings: Config) -> None:
    """Shows what `run` would do."""
    checkpoint, _, conditioning = check(settings)
    sources, train, shape = settings.data.sources(), settings.train, checkpoint.config
    counted = [(source, list(source.read())) for source in sources]
    records = sum(round(source.weight * len(rows)) for source, rows in counted)
    pictured = sum(bool(record["image"]) for _, rows in counted for record in rows)
    images = sum(len(source.image_paths()) for source in sources) if conditioning else 0
    steps = -(-records // train.global_batch)
    model = meta_llama(shape)
    model.add_adapter(settings.adapter.adaption(conditioning and conditioning.projection))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    show_table(
        "plan",
        ["", ""],
        [
            [
                "base",
                f"{settings.base.path}: {shape.n_layers} layers of width {shape.dim}, held in {settings.base.dtype}",
            ],
            ["trainable parameters", f"{trainable:,}"],
            ["records in an epoch", f"{records:,}, less what is held out for validation"],
            ["images", f"{images:,}, {settings.vision.mode}" if settings.vision else _left_out(pictured)],
            ["steps", f"{train.total_steps(steps):,} of {train.global_batch} records"],
            ["peak learning rate", f"{settings.optimizer.base_lr * train.global_batch / 256:.3g}"],
            ["workers", f"{settings.scale.workers} under ZeRO-{settings.zero.stage}"],
            ["run folder", str(settings.run.folder)],
        ],
    )


@job
def run(settings: Config) -> dict[str, Any]:
    """Trains or resumes; returns and writes `result.json`, beside `adapter.safetensors` and `metrics.jsonl`."""
    checkpoint, tokenizer, conditioning = check(settings)
    folder = settings.run.folder
    if not (folder / "result.json").exists():
        _train(settings, checkpoint, tokenizer, conditioning)
    result = read_json(folder / "result.json")
    show_result(settings.run.name, result)
    return result


def prepare(settings: Config) -> None:
    """Makes the tokens and features that a run will read, unless they are there."""
    _, tokenizer, conditioning = check(settings)
    connect(settings.run.cache_folder)
    _prepare(settings, tokenizer, conditioning)


def _prepare(
    settings: Config, tokenizer: Path, conditioning: ImageConditioning | None, run: Path | None = None
) -> tuple[TokenStore, ImageSource | None]:
    data = settings.data
    store = prepare_tokens(
        data,
        tokenizer,
        settings.run.cache_folder,
        val_sources=data.val_sources(),
        val_fraction=0.0 if data.val_path else data.val_fraction,
        preprocess=conditioning and conditioning.encoder.preprocess,
        run=run,
    )
    if store.images_left_out:
        print(f"images: {_left_out(store.images_left_out)}", flush=True)
    if not store.rows("train"):
        raise UserError("no record is left to train on: lower data.val_fraction, or give more records")
    pictures = None
    if settings.vision and conditioning:
        pictures = prepare_image_source(
            settings.vision,
            conditioning,
            [*data.sources(), *data.val_sources()],
            resolve_path(store.folder) / IMAGE_LISTS,
            settings.run.cache_folder,
            settings.scale,
            settings.train.seed,
        )
    return store, pictures


def _left_out(images: int) -> str:
    return f"left out, of {images:,} records: there is no vision section" if images else "none"


def _train(settings: Config, checkpoint: Checkpoint, tokenizer: Path, conditioning: ImageConditioning | None) -> None:
    folder = open_run(settings.run, settings)
    connect(folder, settings.run.cache_folder)
    settings.scale.resources()  # what can never fit is told before there is any work
    store, pictures = _prepare(settings, tokenizer, conditioning, folder)
    adaption = settings.adapter.adaption(conditioning and conditioning.projection)
    job = TrainJob(
        base=str(resolve_path(settings.base.path)),
        dtype=settings.base.dtype,
        adaption=adaption,
        store=store,
        weights=tuple(source.weight for source in settings.data.sources()),
        images=pictures,
        encoder=conditioning.encoder if isinstance(pictures, StreamedImages) and conditioning else None,
        train=settings.train,
        optimizer=settings.optimizer,
        zero=settings.zero,
    )
    state = fit(job, settings.scale, folder, settings.run.track)
    model = meta_llama(checkpoint.config)
    model.add_adapter(adaption)
    model.reset_adapter(None, "cpu")
    with torch.no_grad():
        for name, parameter in model.adapter_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name])
    file = extract_adapter(
        model, base_fingerprint=checkpoint.fingerprint, tokenizer_sha256=Tokenizer(cached_path(tokenizer)).sha256
    )
    with atomic_path(folder / "adapter.safetensors") as temporary:
        file.save(temporary)
    rows = read_jsonl(folder / "metrics.jsonl")
    losses, validated = ([row[name] for row in rows if name in row] for name in ("loss", "val_loss"))
    told = f"held-out loss {validated[0]:.3f} → {validated[-1]:.3f}" if validated else f"training loss {losses[-1]:.3f}"
    result = {
        "headline": told,
        "adapter": str(folder / "adapter.safetensors"),
        "trainable_parameters": file.trainable,
        "steps": job.total_steps,
        "train_records": store.rows("train"),
        "val_records": store.rows("val"),
        **({"train_records_with_image": store.images("train")} if conditioning else {}),
        "rejected_records": store.rejected,
        "train_loss": round(losses[-1], 5),
        "base_val_loss": round(validated[0], 5) if validated else None,
        "val_loss": round(validated[-1], 5) if validated else None,
    }
    write_json(folder / "result.json", result)
