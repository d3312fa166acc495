"""Measure the speed of one training step in examples per second, against PEFT and against a lower bound of its time.

A step is forward, backward and AdamW on the adapter, over one global batch of real records. All of these run in turn,
in the same process, on the same frozen weights and batches:

    ours     this library: micro-batches of similar lengths under a token budget, each distinct prefix computed once, no
             padding, the last layer and the head at labelled positions only
    bf16     the same with the frozen base in bfloat16
    peft     PEFT's AdaptionPrompt on transformers (SDPA), padded to the longest of each micro-batch, without attention
             mask (padding is on the right), at the fastest micro-batch size
    litgpt   where it can be imported: its adapter and its loss, as its own recipe calls them, on other random weights,
             at its own fastest micro-batch size
    floor    only the matrix products of an implementation that computes every real token, as plain torch.mm in float32:
             all layers forward; the gradient with respect to the input of every product above the lowest trainable
             prompt (so not of wq, wk, wv in the lowest adapted layer); the head forward and backward for the labelled
             rows. No attention, norms, rotations, activations, memory or optimiser. Ours may be faster, because it
             computes fewer tokens; `computed` is their share of the real ones.

    python -m benchmarks.adapter_step --data alpaca_data.json --tokenizer tokenizer.model --json
    python -m benchmarks.adapter_step --data alpaca_data.json --tokenizer SmolLM2-135M --shape smollm2 --json

Figures are medians over steps, in examples per second. Needs the extra `bench`. litgpt wants other versions of its
packages than this project; without its dependencies, in a folder on PYTHONPATH, its model can be imported:

    pip install --no-deps --target peers litgpt lightning lightning_utilities torchmetrics
"""

import argparse
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import AdaptionPromptConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig as PeerConfig
from transformers import LlamaForCausalLM

from adapter.adaption import AdaptionConfig
from adapter.batching import collate
from adapter.decoder import Decoder
from adapter.decoder_config import DecoderConfig
from adapter.micro_batches import micro_batches
from adapter.packing import pack
from adapter.records.encoding import encode_record
from adapter.records.example import Example
from adapter.records.reader import read_records
from adapter.tokenizers.load import load_tokenizer

LLAMA_512 = DecoderConfig(
    dim=512, n_layers=8, n_heads=8, n_kv_heads=8, hidden_dim=1376, vocab_size=32_000, max_seq_len=512, norm_eps=1e-6
)
SMOLLM2 = DecoderConfig(
    dim=576, n_layers=30, n_heads=9, n_kv_heads=3, hidden_dim=1536, vocab_size=49_152, max_seq_len=512, norm_eps=1e-5
)
SHAPES = {"llama_512": (LLAMA_512, 6), "smollm2": (SMOLLM2, 28)}
"""Shape of the base, and number of adapted layers, by name."""
WIDTH = 512
PEER_SIZES = (1, 2, 4, 8)

PEER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

Batch = list[Example]


def label_count(batch: Batch) -> int:
    return sum(example.n_labels for example in batch)


def step(
    batch: Batch,
    parts: list[list[int]],
    loss_sum: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
) -> float:
    """Run one training step over the parts of a batch. Returns its loss, the mean over labels."""
    n_labels, total = label_count(batch), 0.0
    for part in parts:
        tokens, labels = collate([batch[i].ids for i in part], [batch[i].label_spans for i in part])
        loss = loss_sum(tokens, labels) / n_labels
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return total


def in_order(batch: Batch, size: int) -> list[list[int]]:
    return [list(range(start, min(start + size, len(batch)))) for start in range(0, len(batch), size)]


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=9e-3 / 4, weight_decay=0.02)


def make_our_model(shape: str, dtype: torch.dtype = torch.float32) -> Decoder:
    """This library's model, with random weights and non-zero gates, so that the first loss depends on the prompts."""
    base, n_layers = SHAPES[shape]
    model = Decoder(base).to(dtype)
    generator = torch.Generator().manual_seed(0)
    # PEFT knows no other gate.
    model.add_adapter(AdaptionConfig(n_layers=n_layers, prompt_length=10, gate="identity"), generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() == 1:
                parameter.fill_(0.1)
            elif not parameter.requires_grad and parameter.dim() == 2:
                parameter.normal_(std=0.02, generator=generator)
            elif not parameter.requires_grad:
                parameter.fill_(1.0)
    return model


def make_peft_model(ours: Decoder) -> torch.nn.Module:
    """PEFT's adaption prompts on transformers' decoder, with all weights of our model."""
    shape = ours.config
    names = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"} | {
        f"layers.{i}.{our}": f"model.layers.{i}.{their}"
        for i in range(shape.n_layers)
        for our, their in PEER_NAMES.items()
    }
    base = LlamaForCausalLM(
        PeerConfig(
            hidden_size=shape.dim,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_kv_heads,
            intermediate_size=shape.hidden_dim,
            vocab_size=shape.vocab_size,
            rms_norm_eps=shape.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            max_position_embeddings=shape.max_seq_len,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
    state = {name.removesuffix(".weight"): w for name, w in ours.state_dict().items() if "adaption" not in name}
    base.load_state_dict({f"{names[name]}.weight": weight for name, weight in state.items()}, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a property by its old name
        model = get_peft_model(
            base,
            AdaptionPromptConfig(
                adapter_layers=len(ours.adaptions), adapter_len=len(ours.adaptions[0].prompt), task_type="CAUSAL_LM"
            ),
        )
    wrapped: list[Any] = [module for module in model.modules() if hasattr(module, "adaption_prompt")]
    with torch.no_grad():
        for layer, adaption in zip(wrapped, ours.adaptions, strict=True):
            layer.adaption_prompt.copy_(adaption.prompt[None])
            layer.adaption_gate.copy_(adaption.gate[:1])
    return model


def make_litgpt_model(ours: Decoder) -> torch.nn.Module | None:
    """litgpt's adapter in our model's shape, with random weights; None where litgpt is not there."""
    try:
        from litgpt.adapter import GPT, Config, mark_only_adapter_as_trainable
    except ImportError:
        return None
    shape = ours.config
    model = GPT(
        Config(
            n_layer=shape.n_layers,
            n_embd=shape.dim,
            n_head=shape.n_heads,
            n_query_groups=shape.n_kv_heads,
            head_size=shape.head_dim,
            intermediate_size=shape.hidden_dim,
            block_size=shape.max_seq_len,
            vocab_size=shape.vocab_size,
            padded_vocab_size=shape.vocab_size,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            norm_eps=shape.norm_eps,
            mlp_class_name="LLaMAMLP",
            adapter_prompt_length=len(ours.adaptions[0].prompt),
            adapter_start_layer=shape.n_layers - len(ours.adaptions),
        )
    )
    mark_only_adapter_as_trainable(model)
    return model


class Floor:
    """The matrix products of a step, each (rows, in) times (in, out), written into preallocated memory."""

    CHUNK = 512
    """Rows per product. On one core, 512 and 2,048 took equal time, within noise, and 128 took a tenth more."""

    def __init__(self, shape: str) -> None:
        base, n_adapted = SHAPES[shape]
        dim, hidden, heads = base.dim, base.hidden_dim, base.n_kv_heads * base.head_dim
        square, narrow, up, down = (torch.randn(s) for s in ((dim, dim), (heads, dim), (hidden, dim), (dim, hidden)))
        head = torch.randn(base.vocab_size, dim)
        attention, rest = [square, narrow, narrow], [square, up, up, down]  # wq, wk, wv; wo, w1, w3, w2; each (out, in)
        forward = base.n_layers * [w.T for w in attention + rest]
        backward = n_adapted * rest + (n_adapted - 1) * attention
        self.per_token: list[Tensor] = forward + backward
        self.per_label = [head.T, head]
        sizes = {n for w in (*self.per_token, *self.per_label) for n in w.shape}
        self.rows = {n: torch.randn(self.CHUNK, n) for n in sizes}
        self.out = {n: torch.empty(self.CHUNK, n) for n in sizes}

    def __call__(self, batch: Batch) -> None:
        self._multiply(sum(len(example.ids) for example in batch), self.per_token)
        self._multiply(label_count(batch), self.per_label)

    def _multiply(self, n_rows: int, weights: list[Tensor]) -> None:
        for start in range(0, n_rows, self.CHUNK):
            n = min(self.CHUNK, n_rows - start)
            for weight in weights:
                torch.mm(self.rows[weight.shape[0]][:n], weight, out=self.out[weight.shape[1]][:n])


def seconds(clock: Callable[[], float], run: Callable[..., object], *args: object) -> float:
    start = clock()
    run(*args)
    return clock() - start


class Contestants:
    """The training steps to compare, each on a batch."""

    def __init__(self, shape: str, token_budget: int) -> None:
        self.token_budget = token_budget
        self.our_model, self.bf16_model = make_our_model(shape), make_our_model(shape, torch.bfloat16)
        self.peft_model = make_peft_model(self.our_model)
        models = self.our_model, self.bf16_model, self.peft_model
        self.our_optimizer, self.bf16_optimizer, self.peft_optimizer = map(make_optimizer, models)
        self.litgpt_model = make_litgpt_model(self.our_model)
        if self.litgpt_model is not None:
            self.litgpt_optimizer = make_optimizer(self.litgpt_model)
        self.floor = Floor(shape)

    def parts(self, batch: Batch) -> list[list[int]]:
        return micro_batches([len(example.ids) for example in batch], self.token_budget)

    def ours(self, batch: Batch) -> float:
        return step(batch, self.parts(batch), self.our_model, self.our_optimizer)

    def bf16(self, batch: Batch) -> float:
        return step(batch, self.parts(batch), self.bf16_model, self.bf16_optimizer)

    def computed(self, batch: Batch) -> float:
        """The tokens that ours computes, as a share of the real ones."""
        batches = [
            collate([batch[i].ids for i in part], [batch[i].label_spans for i in part]) for part in self.parts(batch)
        ]
        return sum(len(pack(*one).tokens) for one in batches) / sum(len(example.ids) for example in batch)

    def peft(self, batch: Batch, size: int) -> float:
        def loss_sum(tokens: Tensor, labels: Tensor) -> Tensor:
            return self.peft_model(input_ids=tokens, labels=labels, num_items_in_batch=1).loss

        return step(batch, in_order(batch, size), loss_sum, self.peft_optimizer)

    def litgpt(self, batch: Batch, size: int) -> float:
        from litgpt.utils import chunked_cross_entropy

        model: Any = self.litgpt_model

        def loss_sum(tokens: Tensor, labels: Tensor) -> Tensor:
            for block in model.transformer["h"]:
                block.attn.adapter_kv_cache = None  # litgpt keeps the last step's, whose graph is gone
            logits = model(tokens, lm_head_chunk_size=128)
            logits[-1] = logits[-1][:, :-1]
            return chunked_cross_entropy(logits, labels[:, 1:]) * (labels[:, 1:] != -100).sum()

        return step(batch, in_order(batch, size), loss_sum, self.litgpt_optimizer)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="instruction records: JSON, JSONL or Parquet")
    parser.add_argument("--tokenizer", required=True, help="a tokenizer of at most the vocabulary of the shape")
    parser.add_argument("--shape", choices=SHAPES, default="llama_512", help="of the base (default: llama_512)")
    parser.add_argument("--batch", type=int, default=64, help="examples in a global batch (default: 64, the paper's)")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each contestant (default: 5)")
    parser.add_argument(
        "--token-budget", type=int, default=1024, help="tokens in a micro-batch of ours (default: 1024)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all cores)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count processor seconds, with one thread: for a machine that is shared"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    args.threads = 1 if args.cpu_time else args.threads
    return args


def load_batches(data: str, tokenizer_path: str, shape: str, batch_size: int, count: int) -> list[Batch]:
    """`count` batches of records in random order, encoded."""
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.check_fits(SHAPES[shape][0].vocab_size)
    records = list(read_records(data))
    random.Random(0).shuffle(records)
    if len(records) < batch_size * count:
        raise SystemExit(f"{data} holds {len(records)} records, {batch_size} x {count} are needed")
    examples = [encode_record(record, tokenizer, max_length=WIDTH) for record in records[: batch_size * count]]
    return [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]


def warm_up(contestants: Contestants, batch: Batch, clock: Callable[[], float]) -> dict[str, int]:
    """Run every contestant once; check that ours and PEFT's compute the same loss. Returns each peer's best size."""
    our_loss, peft_loss = contestants.ours(batch), contestants.peft(batch, PEER_SIZES[0])
    print(f"loss of the first step: ours {our_loss:.5f}, peft {peft_loss:.5f}")
    torch.testing.assert_close(our_loss, peft_loss, rtol=1e-4, atol=0)
    peers = {"peft": contestants.peft}
    if contestants.litgpt_model is not None:
        contestants.litgpt(batch, PEER_SIZES[0])
        peers["litgpt"] = contestants.litgpt
    fastest = {}
    for name, peer in peers.items():
        times = {size: seconds(clock, peer, batch, size) for size in PEER_SIZES}
        fastest[name] = min(times, key=lambda size: times[size])
        of_sizes = ", ".join(f"{k}: {v:.1f} s" for k, v in times.items())
        print(f"{name} is fastest at micro-batches of {fastest[name]}: {of_sizes}")
    contestants.floor(batch)
    return fastest


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    first, *batches = load_batches(
        args.data, args.tokenizer, args.shape, args.batch, args.steps + 1
    )  # the first to warm up
    contestants = Contestants(args.shape, args.token_budget)
    sizes = warm_up(contestants, first, clock)
    rates: dict[str, list[float]] = {name: [] for name in ("ours", "bf16", *sizes, "floor")}
    for number, batch in enumerate(batches, 1):
        rates["ours"].append(len(batch) / seconds(clock, contestants.ours, batch))
        rates["bf16"].append(len(batch) / seconds(clock, contestants.bf16, batch))
        for name, size in sizes.items():
            rates[name].append(len(batch) / seconds(clock, getattr(contestants, name), batch, size))
        rates["floor"].append(len(batch) / seconds(clock, contestants.floor, batch))
        n_tokens = sum(len(example.ids) for example in batch)
        print(
            f"step {number}: {n_tokens} tokens, {label_count(batch)} labels; examples/s: "
            + ", ".join(f"{name} {rate[-1]:.2f}" for name, rate in rates.items()),
            flush=True,
        )
    result = {name: round(statistics.median(rate), 3) for name, rate in rates.items()}
    result["computed"] = round(statistics.mean(map(contestants.computed, batches)), 3)
    counted = "processor time, 1 thread" if args.cpu_time else f"wall time, {args.threads} threads"
    print(
        f"ours is {result['ours'] / result['peft']:.2f} x peft, {result['ours'] / result['floor']:.0%} of the floor, "
        f"and computes {result['computed']:.0%} of the tokens; bf16 is {result['bf16'] / result['ours']:.2f} x ours "
        f"({counted})"
    )
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
