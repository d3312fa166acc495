"""Compare the loss curves of training on a base in bf16 and in float32, and both with the noise of another order.

    python -m benchmarks.bf16_losses --base stories260K --data alpaca_2000.json [--steps 200] [--batch 8] [--json]

LLaMA-Adapter on all layers with AdamW at a constant rate. Three runs: float32, bf16 on the same batches in the same
order, and float32 on the same batches in another order. After every tenth of the steps the loss on 200 held-out records
is computed. The difference of bf16 to float32 is to be compared with that of the other order.
"""

import argparse
import json
import random
from collections.abc import Sequence

import torch

from adapter.adaption import AdaptionConfig
from adapter.base.checkpoint import load_decoder
from adapter.batching import collate
from adapter.decoder import Decoder
from adapter.micro_batches import micro_batches
from adapter.records.encoding import encode_record
from adapter.records.example import Example
from adapter.records.reader import read_records
from adapter.tokenizers.load import load_tokenizer
from benchmarks.adapter_step import step
from rayjobs.reporting.tables import markdown_table

HELD_OUT, LENGTH, POINTS, RATE = 200, 384, 10, 2.5e-3


def held_out_loss(model: Decoder, examples: Sequence[Example]) -> float:
    """Return the mean loss per label."""
    total = 0.0
    with torch.no_grad():
        for part in micro_batches([len(example.ids) for example in examples], 2048):
            total += model(*collate([examples[i].ids for i in part], [examples[i].label_spans for i in part])).item()
    return total / sum(example.n_labels for example in examples)


def train(base: str, dtype: torch.dtype, batches: Sequence[list[Example]], held_out: Sequence[Example]) -> list[float]:
    """Train on the batches, and return the held-out loss after every tenth of them."""
    model = load_decoder(base, dtype=dtype)
    model.add_adapter(
        AdaptionConfig(n_layers=model.config.n_layers, prompt_length=10), torch.Generator().manual_seed(0)
    )
    optimizer = torch.optim.AdamW([p for _, p in model.adapter_parameters()], lr=RATE, weight_decay=0.02)
    losses = [held_out_loss(model, held_out)]
    for number, batch in enumerate(batches, 1):
        step(batch, micro_batches([len(example.ids) for example in batch], 2048), model, optimizer)
        if number % (len(batches) // POINTS) == 0:
            losses.append(held_out_loss(model, held_out))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder of the base and its tokenizer")
    parser.add_argument("--data", required=True, help="instruction records")
    parser.add_argument("--steps", type=int, default=200, help="of each run (default: 200)")
    parser.add_argument("--batch", type=int, default=8, help="records in a step (default: 8)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    given = parser.parse_args()
    records, tokenizer = list(read_records(given.data)), load_tokenizer(given.base)
    random.Random(0).shuffle(records)
    wanted = records[: HELD_OUT + given.steps * given.batch]
    examples = [encode_record(record, tokenizer, max_length=LENGTH) for record in wanted]
    held_out, train_on = examples[:HELD_OUT], examples[HELD_OUT:]
    batches = [train_on[at : at + given.batch] for at in range(0, len(train_on), given.batch)]
    other_order = random.Random(1).sample(batches, len(batches))
    fp32, bf16 = torch.float32, torch.bfloat16
    runs = {"fp32": (fp32, batches), "bf16": (bf16, batches), "other order": (fp32, other_order)}
    curves = {name: train(given.base, dtype, order, held_out) for name, (dtype, order) in runs.items()}
    rows = []
    for i, losses in enumerate(zip(*curves.values(), strict=True)):
        differences = [f"{loss - losses[0]:+.4f}" for loss in losses[1:]]
        rows.append([str(i * len(batches) // POINTS), *(f"{loss:.4f}" for loss in losses), *differences])
    print(markdown_table(["step", *curves, "bf16 - fp32", "other order - fp32"], rows))
    if given.json:
        print(json.dumps(curves))


if __name__ == "__main__":
    main()
