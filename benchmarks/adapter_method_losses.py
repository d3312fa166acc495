"""Every adapter method trained on the same base, records and order: the held-out loss at its best learning rate.

    python -m benchmarks.adapter_method_losses [--examples examples] [--methods lora v2] [--seeds 0 1 2]

The examples are those of `rayjobs example-data`. Each method is trained with each of the same rates, on the settings
of `--config methods`, in one plain loop without a cluster, which is the recipe of `adapter-train` with another order of
records. The rate is chosen by the held-out loss of the first seed; the losses of all seeds at this rate are shown.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import torch

from adapter.base.checkpoint import load_decoder
from adapter.batching import collate
from adapter.methods.registry import METHODS, make_method
from adapter.records.encoding import encode_record
from adapter.records.example import Example, count_labels
from adapter.templates import PromptTemplate
from adapter.tokenizers.load import load_tokenizer
from rayjobs.config import load
from rayjobs.job_configs.adapter_tune import Config
from rayjobs.reporting.tables import markdown_table, mean_and_deviation
from rayjobs.shipped_configs import find_config


def read_examples(folder: Path, max_length: int) -> list[Example]:
    """Return the encoded training records."""
    template = PromptTemplate(**json.loads((folder / "records" / "template.json").read_text()))
    records = json.loads((folder / "records" / "train.json").read_text())
    tokenizer = load_tokenizer(folder / "base")
    return [encode_record(record, tokenizer, template, max_length=max_length) for record in records]


def mean_loss(model: torch.nn.Module, batch: list[Example]) -> torch.Tensor:
    """Return the mean loss per labelled token."""
    tokens, labels = collate([one.ids for one in batch], [one.label_spans for one in batch])
    loss: torch.Tensor = model(tokens, labels)
    return loss / sum(count_labels(one.label_spans) for one in batch)


def train(settings: Config, folder: Path, examples: list[Example], method: str, rate: float, seed: int) -> float:
    """Train one adapter and return its held-out loss; infinity if it diverges."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(examples), generator=generator).tolist()
    n_held_out = round(settings.data.val_fraction * len(examples))
    held_out, kept = ([examples[i] for i in part] for part in (order[:n_held_out], order[n_held_out:]))
    model = load_decoder(folder / "base")
    prompted = method in ("zero_init", "rand_init", "prefix", "v2")
    n_layers = model.config.n_layers if prompted else None
    model.add_adapter(make_method(method, n_layers=n_layers), torch.Generator().manual_seed(seed))
    trained = [one for one in model.parameters() if one.requires_grad]
    recipe, optimizer = settings.train, settings.optimizer
    adamw = torch.optim.AdamW(trained, betas=optimizer.betas, weight_decay=optimizer.weight_decay)
    peak, per_epoch = rate * recipe.global_batch / 256, -(-len(kept) // recipe.global_batch)
    generator.manual_seed(seed)
    step = 0
    for _ in range(int(recipe.epochs)):
        shuffled = torch.randperm(len(kept), generator=generator).tolist()
        for start in range(0, len(kept), recipe.global_batch):
            batch = [kept[i] for i in shuffled[start : start + recipe.global_batch]]
            adamw.param_groups[0]["lr"] = recipe.learning_rate(step, per_epoch, peak)
            mean_loss(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(trained, optimizer.clip_norm or math.inf)
            adamw.step()
            adamw.zero_grad()
            step += 1
    with torch.no_grad():
        loss = mean_loss(model, held_out).item()
    return loss if math.isfinite(loss) else math.inf


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=Path, default=Path("examples"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = load(Config, find_config("methods"))
    examples = read_examples(args.examples, settings.data.max_length)
    rates, rows = settings.sweep.axes["optimizer.base_lr"], []
    for method in args.methods:
        losses = {rate: train(settings, args.examples, examples, method, rate, args.seeds[0]) for rate in rates}
        best = min(losses, key=losses.__getitem__)
        others = [train(settings, args.examples, examples, method, best, seed) for seed in args.seeds[1:]]
        at_best = [losses[best], *others]
        worst = statistics.median(losses.values())
        rows.append([f"`{method}`", f"{best:g}", mean_and_deviation(at_best, 4), f"{worst:.4f}"])
        print(rows[-1], flush=True)
    print(markdown_table(["method", "best base_lr", "held-out loss", "median over the rates"], rows))


if __name__ == "__main__":
    main()
