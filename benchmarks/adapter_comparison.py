"""Every adapter method on a real model: SmolLM2-135M-Instruct in bf16, a task with exact answers, what it forgets.

    python -m benchmarks.adapter_comparison --alpaca alpaca_data.json [--methods lora v2] [--out runs/comparison]

The task is that of `rayjobs demo`: short questions, whose answers are JSON with the answer and the number of its words.
Each method is trained at each of three learning rates with the first seed; the rate with the lowest loss on held-out
training questions is chosen, and trained with the other seeds. These adapters answer test questions, about other
subjects and of other kinds, greedily. Forgetting is the rise of the loss on Alpaca's answers, none of which is trained.

All methods have the same base, records, order, steps and schedule (AdamW, clipped, warm-up and half a cosine), in one
plain loop without a cluster: a start of Ray and DeepSpeed would take longer than a training. `full` trains weights in
float32, because it cannot train 16 bits. Every training, and every measurement of an adapter, is a process of its own,
and its result a file, so that the same command goes on where it was stopped. A run's result has the three parts of
those of PEFT's method comparison (run_info, train_info, meta_info). `comparison.json` and `comparison.md` sum them up.
"""

import argparse
import json
import math
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import torch

from adapter import AdaptedModel
from adapter.adapter_file import extract_adapter
from adapter.batching import collate
from adapter.methods.base import AdapterMethod
from adapter.methods.registry import make_method
from adapter.records.encoding import encode_record
from adapter.records.example import Example, count_labels
from adapter.templates import ChatTemplate
from rayjobs.demo import json_answers
from rayjobs.reporting.paired_differences import mean_and_interval
from rayjobs.reporting.tables import accuracy_cell, markdown_table, mean_and_deviation
from rayjobs.storage.files import read_json, write_json, write_text
from rayjobs.storage.fingerprint import file_fingerprint
from rayjobs.train.config import OptimizerConfig, TrainConfig
from tests.real_models import smollm2

RATES: Mapping[str, tuple[float, ...]] = {
    "zero_init": (0.007, 0.02, 0.06),
    "prefix": (0.007, 0.02, 0.06),
    "v2": (0.001, 0.003, 0.01),
    "lora": (0.0007, 0.002, 0.006),
    "bias": (0.001, 0.003, 0.01),
    "ia3": (0.01, 0.03, 0.1),
    "full": (0.00001, 0.00003, 0.0001),
}
"""Peak learning rates of each method, as many of each, about 3 times apart around a usual one."""
REFERENCE = "zero_init"
TRAIN, HELD_OUT, TEST, ALPACA = 200, 32, 60, 32
"""Records to train on, to choose the rate by, of the test, and of the other text."""
BATCH, MAX_LENGTH, ALPACA_LENGTH = 8, 128, 320
RECIPE = TrainConfig(epochs=1, warmup_epochs=0.1, global_batch=BATCH)
OPTIMIZER = OptimizerConfig(clip_norm=1.0)


class PeakMemory(Thread):
    """Samples the memory of this process from the start to the end of a block."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes, self._ended, self._process = 0, Event(), psutil.Process()

    def run(self) -> None:
        while not self._ended.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)

    def __enter__(self) -> "PeakMemory":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()


def load_model(method: str) -> tuple[AdaptedModel, ChatTemplate]:
    """The base, in the precision that the method trains it in, and its own chat template."""
    dtype = torch.float32 if method == "full" else torch.bfloat16
    model = AdaptedModel.from_pretrained(smollm2(), dtype=dtype)
    assert model.tokenizer.chat_template is not None, "SmolLM2 has a chat template"
    return model, ChatTemplate(source=model.tokenizer.chat_template)


def method_of(name: str, n_layers: int) -> AdapterMethod:
    """The method, with prompts in all layers but the lowest two, as in `--config smollm2`."""
    return make_method(name, n_layers=n_layers - 2 if name in ("zero_init", "prefix", "v2") else None)


def mean_loss(model: AdaptedModel, batch: Sequence[Example]) -> torch.Tensor:
    """The mean loss per labelled token."""
    tokens, labels = collate([one.ids for one in batch], [one.label_spans for one in batch])
    loss: torch.Tensor = model.model(tokens, labels)
    return loss / sum(count_labels(one.label_spans) for one in batch)


@torch.no_grad()
def held_out_loss(model: AdaptedModel, examples: Sequence[Example]) -> float:
    """The mean loss per labelled token of many examples, a batch at a time."""
    counts = [count_labels(one.label_spans) for one in examples]
    total = 0.0
    for start in range(0, len(examples), BATCH):
        part = slice(start, start + BATCH)
        total += mean_loss(model, examples[part]).item() * sum(counts[part])
    return total / sum(counts)


def train(given: argparse.Namespace, method: str, rate: float, seed: int) -> dict[str, Any]:
    """Train one adapter and save it; return the parts of the run's result."""
    model, template = load_model(method)
    records = json_answers.training_records(given.train + HELD_OUT, 0)
    examples = [encode_record(one, model.tokenizer, template, max_length=MAX_LENGTH) for one in records]
    held_out, kept = examples[:HELD_OUT], examples[HELD_OUT:]
    config = method_of(method, model.model.config.n_layers)
    model.add_adapter(config, seed=seed)
    trained = [one for one in model.model.parameters() if one.requires_grad]
    adamw = torch.optim.AdamW(trained, betas=OPTIMIZER.betas, weight_decay=OPTIMIZER.weight_decay)
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed)).tolist()
    steps = -(-len(kept) // BATCH)
    losses, began = [], time.perf_counter()
    with PeakMemory() as memory:
        for step in range(steps):
            batch = [kept[i] for i in order[step * BATCH : (step + 1) * BATCH]]
            adamw.param_groups[0]["lr"] = RECIPE.learning_rate(step, steps, rate)
            loss = mean_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, OPTIMIZER.clip_norm or math.inf)
            adamw.step()
            adamw.zero_grad()
            losses.append(loss.item())
    train_s = time.perf_counter() - began
    path = run_path(given.out, method, rate, seed).with_suffix(".safetensors")
    extract_adapter(model.model).save(path)
    loss_after = held_out_loss(model, held_out)
    return {
        "run_info": {
            "experiment_name": f"{method}/peak-lr-{rate:g}/seed-{seed}",
            "train_config": {
                "lr": rate,
                "seed": seed,
                "steps": steps,
                "batch_size": BATCH,
                "betas": OPTIMIZER.betas,
                "weight_decay": OPTIMIZER.weight_decay,
                "grad_norm_clip": OPTIMIZER.clip_norm,
            },
            "peft_config": {"method": method, **config.header()},
        },
        "train_info": {
            "status": "success" if math.isfinite(loss_after) else "diverged",
            "train_time": train_s,
            "tokens_per_second": sum(len(one.ids) for one in kept) / train_s,
            "peak_memory": memory.peak_bytes,
            "file_size": path.stat().st_size,
            "num_trainable_params": sum(one.numel() for one in trained),
            "metrics": [{"step": step, "train loss": loss} for step, loss in enumerate(losses, 1)],
            "valid loss": loss_after if math.isfinite(loss_after) else None,
        },
        "meta_info": {
            "model_info": {"id": "SmolLM2-135M-Instruct", "dtype": "float32" if method == "full" else "bfloat16"},
            "package_info": {"torch": torch.__version__},
            "system_info": {"machine": platform.machine(), "threads": torch.get_num_threads()},
        },
    }


def measure(given: argparse.Namespace, method: str, adapter: Path | None) -> dict[str, Any]:
    """Answer the test questions and take the loss on Alpaca; of the base alone, in bf16, without an adapter."""
    model, template = load_model(method)
    if adapter is not None:
        model.load_adapter(adapter)
        model.template = template
    other = json.loads(given.alpaca.read_text(encoding="utf-8"))
    random.Random(0).shuffle(other)
    examples = [encode_record(one, model.tokenizer, template, max_length=ALPACA_LENGTH) for one in other[:ALPACA]]
    by_kind = json_answers.held_out_records(given.test, 0)
    records = [record for of_kind in by_kind.values() for record in of_kind]
    began = time.perf_counter()
    texts = model.answer_records(records, max_new_tokens=32, temperature=0.0, template=template)
    return {
        "answer_time": time.perf_counter() - began,
        "alpaca loss": held_out_loss(model, examples),
        "test loss": held_out_loss(
            model, [encode_record(one, model.tokenizer, template, max_length=MAX_LENGTH) for one in records]
        ),
        "form": [json_answers.is_json_answer(text) for text in texts],
        "right": [json_answers.has_right_answer(text, one) for text, one in zip(texts, records, strict=True)],
        "answers": texts,
    }


def run_path(out: Path, method: str, rate: float, seed: int) -> Path:
    """The file of a training's result."""
    return out / "runs" / f"{method}-{rate:g}-{seed}.json"


def in_process(given: argparse.Namespace, path: Path, *words: str) -> dict[str, Any]:
    """The result in a file, which a process of its own makes unless it is there."""
    if not path.exists():
        own = ["--alpaca", given.alpaca, "--out", given.out, "--train", given.train, "--test", given.test]
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", __spec__.name, *map(str, own), *words], check=True)
        print(f"{path.stem}: {time.monotonic() - began:.0f} s", flush=True)
    found: dict[str, Any] = read_json(path)
    return found


def compare(given: argparse.Namespace) -> None:
    """Make every result that is missing, and write the tables."""
    (given.out / "runs").mkdir(parents=True, exist_ok=True)
    settings = {"train": given.train, "test": given.test, "alpaca": file_fingerprint(given.alpaca)}
    kept = given.out / "settings.json"
    if kept.exists() and read_json(kept) != settings:
        raise SystemExit(f"{given.out} holds results of other settings ({read_json(kept)}): choose another --out")
    write_json(kept, settings)
    base = in_process(given, given.out / "base.json", "--measure", "base")
    rows: dict[str, dict[str, Any]] = {}
    for method in given.methods:
        first = given.seeds[0]
        searched = {
            rate: in_process(given, run_path(given.out, method, rate, first), "--one", method, str(rate), str(first))
            for rate in RATES[method]
        }
        losses = {rate: one["train_info"]["valid loss"] for rate, one in searched.items()}
        best = min(losses, key=lambda rate: math.inf if losses[rate] is None else losses[rate])
        for rate in RATES[method]:  # a fully trained base takes half a gigabyte
            if rate != best:
                run_path(given.out, method, rate, first).with_suffix(".safetensors").unlink(missing_ok=True)
        runs = []
        for seed in given.seeds:
            path = run_path(given.out, method, best, seed)
            if not path.with_suffix(".safetensors").exists():  # of a search with another first seed
                path.unlink(missing_ok=True)
            trained = in_process(given, path, "--one", method, str(best), str(seed))
            adapter = str(path.with_suffix(".safetensors"))
            told = in_process(given, path.with_suffix(".test.json"), "--measure", method, adapter)
            runs.append({**trained["train_info"], **told})
        rows[method] = {"rate": best, "at_edge": best in (RATES[method][0], RATES[method][-1]), "runs": runs}
        write_json(given.out / "comparison.json", {"base": base, "methods": rows})
        write_text(given.out / "comparison.md", tables(base, rows))
    print((given.out / "comparison.md").read_text())


def tables(base: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The comparison, and the differences from the reference, paired by seed, in Markdown."""
    columns = ["method", "peak rate", "trained", "adapter MB", "peak memory", "tokens/s", "test loss", "form %"]
    columns += ["right answer %", "Alpaca's loss"]
    n = len(base["form"])
    lines = [["none", "", "0", "", "", "", f"{base['test loss']:.3f}", _share([base["form"]], n),
              _share([base["right"]], n), f"{base['alpaca loss']:.3f}"]]  # fmt: skip
    for method, row in rows.items():
        runs = row["runs"]
        speeds = [one["tokens_per_second"] for one in runs]
        lines.append([
            f"`{method}`",
            f"{row['rate']:g}{' (edge)' if row['at_edge'] else ''}",
            f"{runs[0]['num_trainable_params']:,}",
            f"{runs[0]['file_size'] / 1e6:.2f}",
            f"{max(one['peak_memory'] for one in runs) / 2**30:.2f} GiB",
            f"{statistics.median(speeds):.0f}",
            mean_and_deviation([one["test loss"] for one in runs], 3),
            _share([one["form"] for one in runs], n),
            _share([one["right"] for one in runs], n),
            mean_and_deviation([one["alpaca loss"] for one in runs], 3),
        ])  # fmt: skip
    text = markdown_table(columns, lines)
    text += (
        f"\n± is the standard deviation over {len(next(iter(rows.values()))['runs'])} seeds, brackets Wilson's 95% "
        f"interval over the {n} test questions. `(edge)`: the chosen rate is the lowest or highest that was tried.\n"
    )
    if REFERENCE in rows and len(rows) > 1:
        text += f"\nDifference from `{REFERENCE}`, paired by seed, with its 95% interval over seeds (Student's t):\n\n"
        differences = [
            [f"`{method}`", *(mean_and_interval(_paired(row["runs"], rows[REFERENCE]["runs"], key)) for key in PAIRED)]
            for method, row in rows.items()
            if method != REFERENCE
        ]
        text += markdown_table(["method", *PAIRED.values()], differences)
    return text


PAIRED = {
    "test loss": "test loss",
    "form": "form, points",
    "right": "right answer, points",
    "alpaca loss": "Alpaca's loss",
}
"""Figures that are compared in pairs, and the columns of their differences."""


def _paired(runs: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    def figure(run: Mapping[str, Any]) -> float:
        value = run[key]
        return 100 * statistics.mean(map(float, value)) if isinstance(value, list) else float(value)

    return [figure(one) - figure(other) for one, other in zip(runs, others, strict=True)]


def _share(of_seeds: Sequence[Sequence[bool]], n: int) -> str:
    return accuracy_cell([sum(of_seed) / n for of_seed in of_seeds], n)


def main() -> None:
    """Compare; or, in a process of its own, make one result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alpaca", type=Path, required=True, help="file of Alpaca's records")
    parser.add_argument("--methods", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=TRAIN, help="records to train on")
    parser.add_argument("--test", type=int, default=TEST, help="questions to answer")
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"), help="folder of all results")
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "RATE", "SEED"), help="make one training")
    parser.add_argument("--measure", nargs="+", metavar="METHOD [ADAPTER]", help="measure one adapter, or `base`")
    given = parser.parse_args()
    if not given.alpaca.is_file():
        parser.error(f"--alpaca: there is no file {given.alpaca}")
    if given.one:
        method, rate, seed = given.one[0], float(given.one[1]), int(given.one[2])
        write_json(run_path(given.out, method, rate, seed), train(given, method, rate, seed))
    elif given.measure:
        method, adapter = given.measure[0], Path(given.measure[1]) if len(given.measure) > 1 else None
        path = adapter.with_suffix(".test.json") if adapter else given.out / "base.json"
        write_json(path, measure(given, method, adapter))
    else:
        compare(given)


if __name__ == "__main__":
    main()
