"""Small generated data in the layouts of the real data sets, and a small LLaMA that is really trained."""

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from PIL import Image

SUBJECTS = ("natural science", "social science", "language science")
CHOICES = (
    ("solid", "liquid", "gas"),
    ("a solid", "a liquid"),
    ("the Pacific Ocean", "the Atlantic Ocean", "the Indian Ocean", "the Arctic Ocean"),
    ("12 centimeters", "12 kilometers"),
    ("yes", "no"),
    ("Neither sentence.", "Both sentences."),
    ("It is a complete sentence.", "It is a run-on sentence.", "It is a sentence fragment."),
    ("alliteration", "onomatopoeia"),
    ("Mr. Bell's letter, dated 1876", "Mr. Bell's letters, dated 1876"),
    ("a. afarensis", "b. physalus"),
    ("at 10:30 A.M.", "at 10:30 P.M.", "at noon"),
    ("$4", "$14", "$40"),
    ("Anna", "Ben", "C. Diaz", "Dora and Ben", "E. Ito"),
)
HINTS = (
    "",
    "Look at the picture.",
    "Figure: a spacecraft.\nThe test shows how steady a parachute is at 200 km per hour.",
)


def write_scienceqa(folder: Path, count: int = 60) -> Path:
    """`count` test problems in ScienceQA's layout. Of 60: 20 of each subject; hints for 40; images for 24, 8 of them
    without a hint, so that 12 have neither; 30 of either half of the grades."""
    rng, problems = np.random.default_rng(0), {}
    for i in range(count):
        choices = CHOICES[i % len(CHOICES)]
        pid, image = str(1000 + 7 * i), "image.png" if i % 5 in (1, 2) else None
        problems[pid] = {
            "question": f"Which of these is number {i}?",
            "choices": choices,
            "answer": i % len(choices),
            "hint": HINTS[i // 2 % 3],
            "image": image,
            "task": "closed choice",
            "grade": f"grade{1 + i % 12}",
            "subject": SUBJECTS[i % 3],
            "lecture": "",
            "solution": "",
            "split": "test",
        }
        if image:
            path = folder / "images" / "test" / pid / image
            path.parent.mkdir(parents=True)
            Image.fromarray(rng.integers(0, 255, (23 + i, 41, 3), np.uint8)).save(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
    return folder


CALTECH = {"bonsai": (60, 120, 50), "flamingo": (240, 130, 150), "joshua_tree": (150, 160, 90), "pizza": (210, 120, 40)}
SAYINGS = ("A photo of a {}.", "Seen from far away on a bright and sunny day, this is most certainly the {}.")
CALTECH_COUNTS = {"train": 8, "val": 4, "test": 6}


def write_caltech(root: Path) -> Path:
    """Caltech101's layout as CoOp has it, with noisy coloured JPEGs, and `caltech_prompts.json` beside it, ten
    sentences for each class."""
    rng, split = np.random.default_rng(0), {part: [] for part in CALTECH_COUNTS}
    images = root / "caltech-101" / "101_ObjectCategories"
    for label, (name, colour) in enumerate(CALTECH.items()):
        (images / name).mkdir(parents=True)
        parts = [part for part, count in CALTECH_COUNTS.items() for _ in range(count)]
        for number, part in enumerate(parts, 1):
            path = f"{name}/image_{number:04d}.jpg"
            pixels = np.array(colour) + rng.normal(0, 40, (60 + number, 80, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(images / path)
            split[part].append([path, label, name])
    (root / "caltech-101" / "split_zhou_Caltech101.json").write_text(json.dumps(split))
    sentences = {name: [saying.format(f"{name} {i}") for i in range(5) for saying in SAYINGS] for name in CALTECH}
    (root / "caltech_prompts.json").write_text(json.dumps(sentences))
    return root


ANIMALS, PLACES = ("cat", "dog", "bird", "horse", "mouse"), ("mat", "hill", "house", "bench", "road")
COLOURS, DEEDS = ("red", "big", "old", "shy"), ("sat on", "ran over", "slept under", "looked at")


def _sentence(rng: random.Random) -> tuple[str, str]:
    """A sentence, and where it takes place."""
    place = f"the {rng.choice(PLACES)}"
    return f"The {rng.choice(COLOURS)} {rng.choice(ANIMALS)} {rng.choice(DEEDS)} {place}.", place


def write_instructions(path: Path, count: int = 240) -> Path:
    """Records as Alpaca has them, with and without input, in one JSON array."""
    rng, records = random.Random(0), []
    for i in range(count):
        text, place = _sentence(rng)
        asked = (
            {"instruction": "Say where it takes place.", "input": text} if i % 3 else {"instruction": text, "input": ""}
        )
        records.append({**asked, "output": f"It all takes place at {place}, and that is number {i}."})
    path.write_text(json.dumps(records))
    return path


def train_llama(folder: Path, steps: int = 60) -> Path:
    """A LLaMA of 0.3 M parameters in Meta's format, trained for seconds on sentences such as the records' inputs:
    5 layers, a window of 512 tokens, a SentencePiece tokenizer with byte fallback."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from adapter.records.scienceqa import TEMPLATE
    from adapter.templates import ALPACA
    from tests.adapter.base.test_checkpoint import write_meta

    rng = random.Random(1)
    texts = [" ".join(_sentence(rng)[0] for _ in range(4)) for _ in range(400)]
    prompts = [template.render("Which of these?", "Options: (A) yes (B) no") for template in (ALPACA, TEMPLATE)]
    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, *prompts * 20, *["".join(map(chr, range(33, 127)))] * 20]), model_writer=data,
        vocab_size=512, model_type="bpe", byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=data.getvalue())
    stream = [id for text in texts for id in (tokenizer.bos_id(), *tokenizer.encode(text))]
    rows = torch.tensor(stream[: len(stream) // 48 * 48]).view(-1, 48)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "vocab_size": 512}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        batch = rows[torch.arange(step * 32, step * 32 + 32) % len(rows)]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    write_meta(folder, model, multiple_of=4, vocab_size=512, max_seq_len=512)
    (folder / "tokenizer.model").write_bytes(data.getvalue())
    return folder
