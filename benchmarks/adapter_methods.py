"""A training step of each adapter method on the same base and batch: time beside full fine-tuning's, and memory.

    python -m benchmarks.adapter_methods [--dim 512] [--layers 8] [--rounds 9]

The base has random weights in float32. All methods take turns within a round, so that other load on the machine meets
all alike; the median over the rounds counts. Trained: parameters that are trained. State: float32 gradient and AdamW's
two moments. Activations: what autograd keeps for the backward pass, without parameters.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

from adapter.base.binding import meta_decoder
from adapter.decoder import Decoder
from adapter.decoder_config import DecoderConfig
from adapter.methods.registry import METHODS, make_method
from rayjobs.reporting.tables import markdown_table
from rayjobs.storage.hub_model import format_bytes

ROWS, TOKENS, VOCABULARY = 4, 128, 4096


def build(name: str, dim: int, layers: int) -> Decoder:
    """Return a decoder with random weights and a method's adapter, with prompts in all layers but two."""
    shape = DecoderConfig(
        dim=dim, n_layers=layers, n_heads=8, n_kv_heads=4, hidden_dim=dim * 8 // 3, vocab_size=VOCABULARY
    )
    model = meta_decoder(shape).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    prompted = name in ("zero_init", "rand_init", "prefix", "v2")
    model.add_adapter(make_method(name, n_layers=layers - 2 if prompted else None), torch.Generator().manual_seed(0))
    return model


def saved_bytes(model: Decoder, tokens: Tensor) -> int:
    """Return the bytes that a step keeps for its backward pass, without the parameters."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, tokens)
    del loss
    return sum(sizes.values())


def step_s(model: Decoder, optimizer: torch.optim.Optimizer, tokens: Tensor) -> float:
    """Return the CPU seconds of one training step."""
    began = time.process_time()
    model(tokens, tokens).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - began


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokens = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    models = {name: build(name, args.dim, args.layers) for name in METHODS}
    trained = {name: [one for one in model.parameters() if one.requires_grad] for name, model in models.items()}
    optimizers = {name: torch.optim.AdamW(parameters, lr=1e-4) for name, parameters in trained.items()}
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for round_ in range(args.rounds + 1):  # the first is not counted
        for name, model in models.items():
            seconds = step_s(model, optimizers[name], tokens)
            times[name] += [seconds] if round_ else []
    median = {name: statistics.median(of) for name, of in times.items()}
    rows = []
    for name, model in models.items():
        count = sum(one.numel() for one in trained[name])
        kept = format_bytes(saved_bytes(model, tokens))
        rows.append([f"`{name}`", f"{count:,}", f"{median[name] / median['full']:.2f}", format_bytes(12 * count), kept])
    print(markdown_table(["method", "trained", "step, of full's", "state", "activations"], rows))


if __name__ == "__main__":
    main()
