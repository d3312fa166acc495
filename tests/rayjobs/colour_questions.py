"""Questions in ScienceQA's layout that only an image answers: red is (A), blue is (B)."""

import random
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from adapter import AdaptedModel
from adapter.adaption import AdaptionConfig
from adapter.records.encoding import encode_record
from adapter.records.scienceqa import TEMPLATE, read_problems
from rayjobs.inference.batch import read_pixels
from rayjobs.models.image_conditioning import ImageFeaturizer, VisionConfig
from rayjobs.storage.files import write_json
from tests.conftest import WORDS, make_base

COLOURS = ((200, 40, 40), (50, 60, 210))


def write_base(folder: Path) -> Path:
    """Write a random LLaMA whose tokenizer has a piece for each letter."""
    folder.mkdir(parents=True)
    sentences = [" ".join(random.Random(i).choices(WORDS, k=12)) for i in range(200)]
    return make_base(
        folder, [*sentences, *["Question: Options: (A) red (B) bird Answer: The answer is (A). (B)."] * 30]
    )


def write_questions(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """Write so many problems for each split; every fifth has no image, so its answer is a guess."""
    draw, problems = np.random.default_rng(seed), {}
    splits = {split: [f"{split}{i}" for i in range(count)] for split, count in counts.items()}
    for split, pids in splits.items():
        for i, pid in enumerate(pids):
            problems[pid] = {
                "question": "the big",
                "choices": ["red", "bird"],
                "answer": i % 2,
                "hint": None,
                "image": "image.png" if i % 5 else None,
                "subject": "natural science",
                "grade": "grade1",
                "split": split,
            }
            path = folder / "images" / split / pid / "image.png"
            path.parent.mkdir(parents=True)
            pixels = np.array(COLOURS[i % 2]) + draw.normal(0, 20, (24, 24, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", splits)
    return folder


def shuffle(questions: Path, shuffled: Path) -> dict[str, int]:
    """Write the same questions with permuted test images; return {pid: the colour that its image shows now}."""
    shutil.copytree(questions, shuffled)
    asked = [problem for problem in read_problems(questions, "test") if problem.image]
    permuted = random.Random(0).sample(asked, len(asked))
    for problem, other in zip(asked, permuted, strict=True):
        shutil.copyfile(questions / other.image, shuffled / problem.image)
    return {problem.pid: other.answer for problem, other in zip(asked, permuted, strict=True)}


def train_adapter(base_path: Path, vision: VisionConfig, questions: Path, file: Path) -> None:
    """Train an adapter that answers with the letter of the colour, by a plain loop of a second or two."""
    base, conditioning = AdaptedModel.from_pretrained(base_path), vision.open()
    base.add_adapter(AdaptionConfig(n_layers=3, prompt_length=5, vision=conditioning.projection))
    asked = [problem for problem in read_problems(questions, "train") if problem.image]
    pixels = [read_pixels(questions / problem.image, conditioning)[0] for problem in asked]
    features = ImageFeaturizer(conditioning.encoder, "cpu").features([one for one in pixels if one is not None])
    tokens = torch.tensor([encode_record(problem.record(), base.tokenizer, TEMPLATE).ids for problem in asked])
    labels = torch.where((tokens == tokens[0]).all(dim=0), -100, tokens)  # the letter: all else is the same
    optimizer = torch.optim.AdamW([p for p in base.model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(40):
        optimizer.zero_grad()
        (base.model(tokens, labels, (features, torch.arange(len(asked)))) / len(asked)).backward()
        optimizer.step()
    base.save_adapter(file)
