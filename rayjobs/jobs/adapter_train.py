"""Trains adaption prompts on a frozen LLaMA: records → token store → Ray Train under ZeRO → adapter.safetensors.

The same command resumes a run that was cut off, with as many workers as are there then; a finished run is shown again.
"""

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from adapter.adaption import AdaptionConfig
from adapter.checkpoint import adapter_from
from adapter.instruct import read_records
from adapter.tokenizer import Tokenizer
from adapter.weights import Checkpoint, skeleton
from rayjobs.base import BaseConfig
from rayjobs.config import config, to_dict
from rayjobs.engine import OptimizerConfig, ZeroConfig
from rayjobs.report import show_table
from rayjobs.runs import recorded
from rayjobs.runtime import RunConfig, connect, open_run
from rayjobs.tables import read_json, read_jsonl, write_json
from rayjobs.tokens import DataConfig, prepare_tokens
from rayjobs.trainer import ScaleConfig, TrainConfig, TrainJob, fit


@config
class AdapterConfig:
    """The adapter's shape."""

    n_layers: int = Field(default=30, ge=1)
    """L, adapted layers, counted from the top."""
    prompt_length: int = Field(default=10, ge=1)
    """K, prompt tokens in each adapted layer."""

    @property
    def adaption(self) -> AdaptionConfig:
        return AdaptionConfig(n_layers=self.n_layers, prompt_length=self.prompt_length)


@config
class Config:
    base: BaseConfig
    data: DataConfig
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    zero: ZeroConfig = ZeroConfig()
    scale: ScaleConfig = ScaleConfig()
    run: RunConfig


FREE_TO_CHANGE = ("run", "scale", "zero")
"""Sections that do not change the result, so that a run may resume under others."""


def check(settings: Config) -> tuple[Checkpoint, Path]:
    """Everything that can be told before a worker starts. Raises ValueError."""
    checkpoint, tokenizer = settings.base.open()
    if settings.adapter.n_layers > checkpoint.config.n_layers:
        raise ValueError(
            f"adapter.n_layers is {settings.adapter.n_layers}, but {settings.base.path} has "
            f"{checkpoint.config.n_layers} layers"
        )
    settings.data.prompt_template()
    for path in [*settings.data.path, *settings.data.val_path]:
        next(read_records(path), None)
    saved = settings.run.folder / "config.yaml"
    if saved.exists():
        before, now = yaml.safe_load(saved.read_text()), to_dict(settings)
        changed = [name for name in now if name not in FREE_TO_CHANGE and now[name] != before.get(name)]
        if changed:
            raise ValueError(
                f"{saved.parent} holds a run with other settings in {', '.join(changed)}: "
                "give this one another run.name, or remove that folder"
            )
    return checkpoint, tokenizer


def plan(settings: Config) -> None:
    """Shows what `run` would do."""
    checkpoint, _ = check(settings)
    records = sum(1 for path in settings.data.path for _ in read_records(path))
    train = settings.train
    steps = -(-records // train.global_batch)
    shape, adaption = checkpoint.config, settings.adapter.adaption
    trainable = adaption.n_layers * (adaption.prompt_length * shape.dim + shape.n_heads)
    show_table(
        "plan",
        ["", ""],
        [
            [
                "base",
                f"{settings.base.path}: {shape.n_layers} layers of width {shape.dim}, held in {settings.base.dtype}",
            ],
            ["trainable parameters", f"{trainable:,}"],
            ["records", f"{records:,}, of which a share is held out for validation"],
            ["steps", f"{train.total_steps(steps):,} of {train.global_batch} records"],
            ["peak learning rate", f"{settings.optimizer.base_lr * train.global_batch / 256:.3g}"],
            ["workers", f"{settings.scale.workers} under ZeRO-{settings.zero.stage}"],
            ["run folder", str(settings.run.folder)],
        ],
    )


@recorded
def run(settings: Config) -> dict[str, Any]:
    """Trains or resumes; returns and writes `result.json`, beside `adapter.safetensors` and `metrics.jsonl`."""
    checkpoint, tokenizer = check(settings)
    folder = settings.run.folder
    if not (folder / "result.json").exists():
        _train(settings, checkpoint, tokenizer)
    result = read_json(folder / "result.json")
    show_table(settings.run.name, ["", ""], [[name.replace("_", " "), str(value)] for name, value in result.items()])
    return result


def _train(settings: Config, checkpoint: Checkpoint, tokenizer: Path) -> None:
    folder = open_run(settings.run, settings)
    connect()
    data = settings.data
    store = prepare_tokens(
        data,
        tokenizer,
        settings.run.cache_folder,
        val_path=data.val_path,
        val_fraction=0.0 if data.val_path else data.val_fraction,
    )
    if not store.rows("train"):
        raise ValueError("no record is left to train on: lower data.val_fraction, or give more records")
    job = TrainJob(
        base=str(Path(settings.base.path).absolute()),
        dtype=settings.base.dtype,
        adaption=settings.adapter.adaption,
        store=store,
        train=settings.train,
        optimizer=settings.optimizer,
        zero=settings.zero,
    )
    state = fit(job, settings.scale, folder, settings.run.track)
    model = skeleton(checkpoint.config)
    model.attach(settings.adapter.adaption)
    trained = {name: tensor for name, tensor in state.items() if name.endswith((".prompt", ".gate"))}
    model.load_state_dict(trained, strict=False, assign=True)
    file = adapter_from(model, base_fingerprint=checkpoint.fingerprint, tokenizer_sha256=Tokenizer(tokenizer).sha256)
    file.save(folder / "adapter.safetensors")
    rows = read_jsonl(folder / "metrics.jsonl")
    losses, validated = ([row[name] for row in rows if name in row] for name in ("loss", "val_loss"))
    result = {
        "adapter": str(folder / "adapter.safetensors"),
        "trainable_parameters": file.prompt.numel() + file.gate.numel(),
        "steps": job.total_steps,
        "train_records": store.rows("train"),
        "val_records": store.rows("val"),
        "rejected_records": store.rejected,
        "train_loss": round(losses[-1], 5),
        "base_val_loss": round(validated[0], 5) if validated else None,
        "val_loss": round(validated[-1], 5) if validated else None,
    }
    write_json(folder / "result.json", result)
