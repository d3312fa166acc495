"""Step time of adapter-train against the number of workers: a model, and its check with two processes on this machine.

    python -m benchmarks.scaling --data alpaca_data.json --tokenizer tokenizer.model [--measure] [--json]

A step's records are divided by `rayjobs.data.sampler.assign_micro_batches`, as in training, and the slowest worker
counts. With P parameters of the base in b bytes each, N workers, and a link of bandwidth B:

    micro-batch   max(operations / (utilisation * peak), bytes of weights / memory bandwidth, the host's time)
    ZeRO-2        + reduce-scatter of the adapter's gradients and all-gather of its values: 2 (N-1)/N bytes / B, and the
                  hops of a ring, 2 (N-1), or of a tree, 4 log2 N, whichever is less
    ZeRO-3        + all-gather of every weight matrix, forward and again backward, for each micro-batch: (N-1)/N P b / B
                  each time, in rings of N-1 hops per matrix, and the copy of its parts into new memory, which reads and
                  writes P b. Devices that overlap communication and computation hide it behind the computation. The
                  host, which also launches the kernels, needs a fixed time per gathered matrix.

Operations are 2 per weight and token forward, and 2 backward from the lowest adapted layer up, for the gradient of the
activations; frozen weights have no gradient. The head is computed for labelled tokens only.

`--measure` runs `rayjobs.train.engine` on a small LLaMA in float32 with gloo, one thread per process. The speed is
taken from one process under ZeRO-2, the host's time per gathered matrix from what ZeRO-3 adds to it, and the link from
bare collectives between two processes, as many in a row as a step has, including their copies. From these the step of
two processes is predicted, and then it is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from adapter.adaption import AdaptionConfig
from adapter.base.checkpoint import save_decoder
from adapter.decoder import Decoder, RMSNorm
from adapter.decoder_config import DecoderConfig
from adapter.records.encoding import encode_record
from adapter.records.reader import read_records
from adapter.tokenizers.load import load_tokenizer
from rayjobs.data.sampler import assign_micro_batches
from rayjobs.train.config import OptimizerConfig, ZeroConfig
from rayjobs.train.engine import Engine, adapted_model

LLAMA_7B = DecoderConfig(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, hidden_dim=11008, vocab_size=32000, max_seq_len=512, norm_eps=1e-6
)
SMALL = DecoderConfig(
    dim=512, n_layers=8, n_heads=8, n_kv_heads=8, hidden_dim=1376, vocab_size=997, max_seq_len=512, norm_eps=1e-6
)


@dataclass(frozen=True, kw_only=True)
class Link:
    """Network between workers."""

    bytes_per_s: float
    """Bandwidth of a ring through all workers, in each direction."""
    hop_s: float
    """Latency from one worker of a ring to the next."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """Hardware of one worker, and its links to the others."""

    flops_per_s: float
    """Peak for dense matrices in the weights' precision."""
    utilisation: float
    """Fraction of the peak that large matrix products, and the operations between them, reach."""
    memory_bytes_per_s: float
    launch_s: float
    """Host time to launch a micro-batch's kernels."""
    gather_s: float
    """Host time per matrix that ZeRO-3 gathers and releases, without the link's time."""
    per_node: int
    inside: Link
    between: Link
    overlaps: bool = True
    """True if the host's work and the gathering of weights run during computation."""

    def link(self, workers: int) -> Link:
        return self.inside if workers <= self.per_node else self.between

    def ring_s(self, workers: int) -> float:
        """Return the latency of a ring's hops; one hop per further node leaves a node."""
        across = -(-workers // self.per_node) - 1
        return across * self.between.hop_s + (workers - 1 - across) * self.inside.hop_s

    def tree_s(self, workers: int) -> float:
        """Return the latency from a tree's leaves to its root: within nodes, then between them."""
        inside, nodes = min(workers, self.per_node), -(-workers // self.per_node)
        return math.ceil(math.log2(inside)) * self.inside.hop_s + math.ceil(math.log2(nodes)) * self.between.hop_s


NVLINK_A100 = Link(bytes_per_s=0.8 * 300e9, hop_s=2e-6)
NVLINK_H200 = Link(bytes_per_s=0.8 * 450e9, hop_s=2e-6)
ETHERNET = Link(bytes_per_s=0.8 * 12.5e9, hop_s=25e-6)
A100 = Device(
    flops_per_s=312e12,
    utilisation=0.45,
    memory_bytes_per_s=2.04e12,
    launch_s=10e-3,
    gather_s=0.21e-3,  # what `--measure` gave for tiny matrices on this project's test machine
    per_node=8,
    inside=NVLINK_A100,
    between=Link(bytes_per_s=0.8 * 8 * 25e9, hop_s=5e-6),  # eight InfiniBand HDR ports per node
)
H200 = replace(
    A100,
    flops_per_s=989e12,
    utilisation=0.40,
    memory_bytes_per_s=4.8e12,
    inside=NVLINK_H200,
    between=Link(bytes_per_s=0.8 * 8 * 50e9, hop_s=5e-6),  # eight InfiniBand NDR ports per node
)
DEVICES = {
    "A100 80 GB, NVLink and InfiniBand": A100,
    "A100 80 GB, NVLink and 100 Gb/s Ethernet": replace(A100, between=ETHERNET),
    "H200, NVLink and InfiniBand": H200,
    "H200, NVLink and 100 Gb/s Ethernet": replace(H200, between=ETHERNET),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """A base model and its adapter in training."""

    shape: DecoderConfig
    adapted: int
    prompt_length: int
    weight_bytes: int

    @property
    def layer(self) -> int:
        """Number of weights in one layer's matrices."""
        kv = self.shape.dim // self.shape.n_heads * self.shape.n_kv_heads
        return 2 * self.shape.dim * (self.shape.dim + kv) + 3 * self.shape.dim * self.shape.hidden_dim

    @property
    def trainable(self) -> int:
        return self.adapted * (self.prompt_length * self.shape.dim + self.shape.n_heads)

    @property
    def passes(self) -> float:
        """Passes through the layers: one forward, and backward the fraction that a gradient reaches."""
        return 1 + self.adapted / self.shape.n_layers

    @property
    def gathers(self) -> float:
        """Number of matrices that ZeRO-3 gathers for a micro-batch."""
        return 7 * self.shape.n_layers * self.passes

    def operations(self, rows: int, length: int, labels: int) -> float:
        """Return the operations of one micro-batch of rows that share no prefix, forward and backward.

        The last token of a row predicts nothing and is left out, as is in the last layer, behind its attention, every
        token without a label.
        """
        dim, layers, tokens = self.shape.dim, self.shape.n_layers, rows * (length - 1)
        behind_attention = dim * dim + 3 * dim * self.shape.hidden_dim
        matrices = 2 * self.layer * layers * self.passes * tokens
        matrices -= 2 * 2 * behind_attention * max(0, tokens - labels)
        attention = 2 * dim * rows * length**2 * (layers + 2.5 * self.adapted)  # half of each square is masked
        return matrices + attention + 4 * dim * self.shape.vocab_size * min(labels, tokens)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step. `gather` leaves out what is hidden behind computation."""

    compute: float
    reduce: float
    gather: float

    @property
    def total(self) -> float:
        return self.compute + self.reduce + self.gather


def step_time(
    work: Work, device: Device, lengths: Sequence[int], labels: float, budget: int, workers: int, stage: int
) -> StepTime:
    """Return the time of a step on records of these lengths, of whose tokens the fraction `labels` is labelled."""
    link, share = device.link(workers), (workers - 1) / workers
    read = work.layer * work.shape.n_layers * work.weight_bytes * work.passes
    gather = host = 0.0
    if stage == 3:
        gather = share * read / link.bytes_per_s + work.gathers * device.ring_s(workers)
        gather += 2 * read / device.memory_bytes_per_s * (workers > 1)
        host = work.gathers * device.gather_s
    slowest = [0.0, 0.0]
    for micros in assign_micro_batches(lengths, budget, workers):
        busy = waited = 0.0
        for micro in micros:
            longest = max((lengths[row] for row in micro), default=1)
            labelled = round(labels * sum(lengths[row] for row in micro))
            flops = work.operations(max(len(micro), 1), longest, labelled)
            took = max(flops / (device.utilisation * device.flops_per_s), read / device.memory_bytes_per_s)
            took = max(took, device.launch_s + host) if device.overlaps else took + device.launch_s + host
            busy += took
            waited += max(0.0, gather - took) + took / work.shape.n_layers * bool(gather) if device.overlaps else gather
        slowest = max(slowest, [busy, waited], key=sum)
    reduce = 0.0
    if workers > 1:
        hops = min(2 * device.ring_s(workers), 4 * device.tree_s(workers))
        reduce = 2 * share * 4 * work.trainable / link.bytes_per_s + hops
    return StepTime(compute=slowest[0], reduce=reduce, gather=slowest[1])


def batches(data: str, tokenizer: str, size: int, count: int) -> tuple[list[list[int]], float]:
    """Return the record lengths of the first global batches, and the fraction of their tokens that is labelled."""
    encoder, examples = load_tokenizer(tokenizer), []
    for record in read_records(data):
        examples.append(encode_record(record, encoder))
        if len(examples) == size * count:
            break
    lengths = [len(example.ids) for example in examples]
    labelled = sum(example.n_labels for example in examples)
    return [lengths[at : at + size] for at in range(0, len(lengths), size)], labelled / sum(lengths)


def model(data: str, tokenizer: str, batch: int, budget: int) -> list[dict[str, object]]:
    """Return the mean step times of the 7B model for every device, stage and number of workers."""
    work = Work(shape=LLAMA_7B, adapted=30, prompt_length=10, weight_bytes=2)
    steps, labels = batches(data, tokenizer, batch, 8)
    rows = []
    for name, device in DEVICES.items():
        for stage in (2, 3):
            one = 0.0
            for workers in (1, 2, 4, 8, 16, 64, 256, 1024):
                times = [step_time(work, device, lengths, labels, budget, workers, stage) for lengths in steps]
                mean = [statistics.mean(getattr(t, part) for t in times) for part in ("compute", "reduce", "gather")]
                one = one or sum(mean)
                rows.append(
                    {
                        "device": name,
                        "stage": stage,
                        "workers": workers,
                        "compute_ms": round(1e3 * mean[0], 1),
                        "reduce_ms": round(1e3 * mean[1], 2),
                        "gather_ms": round(1e3 * mean[2], 1),
                        "step_ms": round(1e3 * sum(mean), 1),
                        "speedup": round(one / sum(mean), 2),
                    }
                )
    return rows


TINY = replace(SMALL, dim=64, hidden_dim=172)
"""A model whose gathers copy almost nothing: on a GPU, copies are not the host's work."""
CHECKED = Work(shape=SMALL, adapted=6, prompt_length=10, weight_bytes=4)
ROWS, LENGTH, STEPS = 8, 96, 7


def worker(base: str, out: str) -> None:
    """Measure, as one of the processes, the link and then the shortest step of each stage."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    measured: dict[str, float] = {}
    if world > 1:
        small, shard = torch.zeros(1), torch.zeros(CHECKED.layer // 7 // world)  # the shard of an average matrix

        measured["hop_s"] = _best_of_series(lambda: dist.all_reduce(small)) / (2 * (world - 1))
        seconds = _best_of_series(lambda: _gather(shard, rank, world))
        measured["bytes_per_s"] = (world - 1) * shard.nbytes / (seconds - (world - 1) * measured["hop_s"])
    tokens = torch.randint(3, SMALL.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    local = tokens[rank::world]
    for stage in (2, 3):
        zero = ZeroConfig(stage=stage)  # type: ignore[arg-type]
        adaption = AdaptionConfig(n_layers=CHECKED.adapted, prompt_length=CHECKED.prompt_length)
        llama = adapted_model(base, adaption, dtype="fp32", zero=zero, seed=0, device=torch.device("cpu"))
        engine = Engine(llama, zero, OptimizerConfig())
        measured[f"stage{stage}_s"] = _best(partial(_step, engine, local, tokens.numel()), STEPS)
    if rank == 0:
        Path(out).write_text(json.dumps(measured))
    dist.destroy_process_group()


def _gather(shard: torch.Tensor, rank: int, world: int) -> None:
    """Gather shards as DeepSpeed does: into new memory, and from there into one tensor in new memory again."""
    whole = torch.empty(world * len(shard))
    parts = whole.chunk(world)
    dist.all_gather_into_tensor(whole, parts[rank].copy_(shard))
    torch.cat(parts)


def _step(engine: Engine, tokens: torch.Tensor, labelled: int) -> None:
    engine.backward(engine.loss(tokens, tokens) / labelled)
    engine.step(1e-3)


def _best_of_series(act: Callable[[], object]) -> float:
    """Return the mean time of one call in a series as long as a step's gathers; the shortest of several series."""
    times = round(CHECKED.gathers)
    return _best(lambda: [act() for _ in range(times)], STEPS) / times


def _best(act: Callable[[], object], times: int) -> float:
    """Return the shortest of several times: other programs on the machine only make them longer."""
    act()
    taken = []
    for _ in range(times):
        dist.barrier()
        began = time.perf_counter()
        act()
        taken.append(time.perf_counter() - began)
    return min(taken)


def least(base: Path, processes: int, runs: list[dict[str, float]]) -> dict[str, float]:
    """Measure once more; return the shortest times and the fastest link of all runs so far."""
    if not base.exists():
        torch.manual_seed(0)
        llama = Decoder(SMALL if base.name == "small" else TINY)
        for module in llama.modules():
            if isinstance(module, RMSNorm):
                module.reset_parameters()
        save_decoder(llama, base)
    out = base / f"{processes}.json"
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    subprocess.run(
        [*command, "-m", "benchmarks.scaling", "--worker", str(base), str(out)],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    runs.append(json.loads(out.read_text()))
    return {name: (max if name == "bytes_per_s" else min)(run[name] for run in runs) for name in runs[0]}


def measure() -> list[dict[str, object]]:
    """Return predicted and measured step times of two processes."""
    runs_of: dict[tuple[str, int], list[dict[str, float]]] = {("small", 1): [], ("small", 2): [], ("tiny", 1): []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            alone, both, tiny = (least(Path(folder) / name, n, runs) for (name, n), runs in runs_of.items())
    link = Link(bytes_per_s=both["bytes_per_s"], hop_s=both["hop_s"])
    here = Device(
        flops_per_s=CHECKED.operations(ROWS, LENGTH, ROWS * LENGTH) / alone["stage2_s"],
        utilisation=1.0,
        memory_bytes_per_s=math.inf,
        launch_s=0.0,
        gather_s=(alone["stage3_s"] - alone["stage2_s"]) / CHECKED.gathers,
        per_node=2,
        inside=link,
        between=link,
        overlaps=False,
    )
    rows = []
    for stage in (2, 3):
        predicted = step_time(CHECKED, here, [LENGTH] * ROWS, 1.0, ROWS * LENGTH, 2, stage)
        measured = both[f"stage{stage}_s"]
        rows.append(
            {
                "stage": stage,
                "one_ms": round(1e3 * alone[f"stage{stage}_s"], 1),
                "two_predicted_ms": round(1e3 * predicted.total, 1),
                "two_measured_ms": round(1e3 * measured, 1),
                "predicted_speedup": round(alone[f"stage{stage}_s"] / predicted.total, 2),
                "measured_speedup": round(alone[f"stage{stage}_s"] / measured, 2),
                "gather_ms": round(1e3 * predicted.gather, 1),
                "host_us_a_gather": round(1e6 * here.gather_s),
                "of_a_tiny_matrix": round(1e6 * (tiny["stage3_s"] - tiny["stage2_s"]) / CHECKED.gathers),
                "reduce_ms": round(1e3 * predicted.reduce, 2),
                "link_MB_per_s": round(link.bytes_per_s / 1e6),
                "hop_us": round(1e6 * link.hop_s),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="file of records, for their lengths")
    parser.add_argument("--tokenizer", help="SentencePiece model")
    parser.add_argument("--global-batch", type=int, default=64, help="records per step (default: 64)")
    parser.add_argument("--token-budget", type=int, default=4096, help="tokens per micro-batch (default: 4096)")
    parser.add_argument("--measure", action="store_true", help="check the model with 1 and 2 processes on this machine")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker)
        return
    rows = model(args.data, args.tokenizer, args.global_batch, args.token_budget) if args.data else []
    checked = measure() if args.measure else []
    for table in (rows, checked):
        if table:
            print("  ".join(table[0]))
            for row in table:
                print("  ".join(str(value) for value in row.values()))
    if args.json:
        print(json.dumps({"model": rows, "check": checked}))


if __name__ == "__main__":
    main()
