"""Measure what it costs that each request has an adapter of its own: 16 requests over 16 adapters on one base.

SmolLM2-135M-Instruct in float32, adapters of 28 layers with 10 prompts each. These take turns in one process:

    16 adapters, one batch      every request with another adapter, in the same steps
    1 adapter, one batch        all requests with the same one
    16 adapters, one by one     as a server does that holds one adapter at a time
    transformers + PEFT         one by one, switching PEFT's adaption prompts; its `generate` with a dynamic cache

Then 1,000 names are registered, each is asked for once, and the memory of the process is read.

    python -m benchmarks.serving_adapters [--tokens 24] [--rounds 3] [--cpu-time] [--json]

Figures are new tokens per second, prompts included, medians over rounds. --cpu-time counts processor seconds on one
thread, for a machine that others use too.
"""

import argparse
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from peft import AdaptionPromptConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adapter.adapter_file import extract_adapter
from adapter.adaption import AdaptionConfig
from adapter.base.checkpoint import load_decoder
from adapter.decoder import Decoder
from adapter.engine.adapters import AdapterStore
from adapter.engine.engine import Engine
from adapter.engine.prepacking import prepack_weights
from adapter.engine.request import Request
from adapter.generation_config import GenerationConfig
from benchmarks.decoding import Clock, make_prompts
from rayjobs.reporting.tables import markdown_table
from tests.real_models import smollm2

N_ADAPTERS, N_REGISTERED = 16, 1000
CONFIG = AdaptionConfig(n_layers=28, prompt_length=10, gate="identity")  # PEFT knows no other gate


def write_adapters(model: Decoder, folder: Path) -> list[Path]:
    """Write adapters with random prompts and gates, and take them off again."""
    files = []
    for number in range(N_ADAPTERS):
        model.add_adapter(CONFIG, torch.Generator().manual_seed(number))
        with torch.no_grad():
            for adaption in model.adaptions:
                adaption.gate.normal_(std=0.1)
        files.append(folder / f"{number}.safetensors")
        extract_adapter(model).save(files[-1])
    model.remove_adapter()
    return files


class Ours:
    """One engine for batches, and one that holds a single sequence."""

    def __init__(self, folder: Path) -> None:
        model = load_decoder(smollm2())
        self.files = write_adapters(model, folder)
        prepack_weights(model)
        self.store = AdapterStore(model)
        for number, file in enumerate(self.files):
            self.store.register(str(number), file)
        self.batch = Engine(model, adapters=self.store, slots=N_ADAPTERS, max_length=256)
        self.single = Engine(model, adapters=self.store, slots=1, max_length=256)

    def run(self, engine: Engine, prompts: Sequence[list[int]], names: Sequence[str], n_tokens: int) -> list[list[int]]:
        """Answer all prompts greedily, each with the adapter of that name."""
        config = GenerationConfig(max_new_tokens=n_tokens, temperature=0)
        handles = [
            engine.submit(Request(prompt=prompt, adapter=name, config=config, stop_ids=()))
            for prompt, name in zip(prompts, names, strict=True)
        ]
        engine.run()
        return [handle.choices[0].ids for handle in handles]


class Peft:
    """transformers with 16 of PEFT's adaption prompts, one of them active at a time."""

    def __init__(self) -> None:
        base = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
        config = AdaptionPromptConfig(
            adapter_len=CONFIG.prompt_length, adapter_layers=CONFIG.n_layers, task_type="CAUSAL_LM"
        )
        self.model = get_peft_model(base, config, adapter_name="0")
        for number in range(1, N_ADAPTERS):
            self.model.add_adapter(str(number), config)
        self.model.eval()

    def run(self, prompts: Sequence[list[int]], names: Sequence[str], n_tokens: int) -> None:
        """Answer the prompts one by one, each with the adapter of that name."""
        for prompt, name in zip(prompts, names, strict=True):
            self.model.set_adapter(name)
            ids = torch.tensor([prompt])
            given = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
            self.model.generate(input_ids=ids, min_new_tokens=n_tokens, max_new_tokens=n_tokens, **given)


def measure_speed(ours: Ours, n_tokens: int, rounds: int, clock: Clock) -> dict[str, float]:
    """Return each contestant's new tokens per second."""
    prompts, names = make_prompts(N_ADAPTERS, 49_152), [str(number) for number in range(N_ADAPTERS)]
    together = ours.run(ours.batch, prompts, names, n_tokens)
    alone = ours.run(ours.single, prompts, names, n_tokens)
    assert together == alone, "a batch of 16 adapters must answer as each adapter does alone"
    peft = Peft()
    contestants: dict[str, Callable[[], object]] = {
        "16 adapters, one batch": lambda: ours.run(ours.batch, prompts, names, n_tokens),
        "1 adapter, one batch": lambda: ours.run(ours.batch, prompts, ["0"] * N_ADAPTERS, n_tokens),
        "16 adapters, one by one": lambda: ours.run(ours.single, prompts, names, n_tokens),
        "transformers + PEFT, one by one": lambda: peft.run(prompts, names, n_tokens),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):  # the first warms up
        for name, call in contestants.items():
            times[name].append(clock(call))
        print(f"round {number} of {rounds}", flush=True)
    return {name: N_ADAPTERS * n_tokens / statistics.median(spent[1:]) for name, spent in times.items()}


def measure_memory(ours: Ours, folder: Path) -> dict[str, float]:
    """Ask 1,000 registered adapters once each. Returns MiB of the process before and after, and MiB of the cache."""
    process = psutil.Process()
    before = process.memory_info().rss
    names = [f"registered {number}" for number in range(N_REGISTERED)]
    for number, name in enumerate(names):
        link = folder / f"{name}.safetensors"
        os.link(ours.files[number % N_ADAPTERS], link)
        ours.store.register(name, link)
    ours.run(ours.batch, [[1]] * N_REGISTERED, names, 1)
    after = process.memory_info().rss
    return {
        "before_mib": before / 2**20,
        "after_mib": after / 2**20,
        "cached_mib": ours.store.cached_bytes / 2**20,
        "file_kib": ours.files[0].stat().st_size / 2**10,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of each request (default: 24)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that are counted (default: 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all cores)")
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds, with one thread")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    given = parser.parse_args()
    torch.set_num_threads(1 if given.cpu_time else given.threads)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        ours = Ours(Path(name))
        memory = measure_memory(ours, Path(name))
        print(
            f"{N_REGISTERED} registered adapters of {memory['file_kib']:.0f} KiB, each used once: the process grew "
            f"from {memory['before_mib']:.0f} to {memory['after_mib']:.0f} MiB; {memory['cached_mib']:.0f} MiB cached",
            flush=True,
        )
        rates = measure_speed(ours, given.tokens, given.rounds, Clock(given.cpu_time))
    one_by_one = rates["16 adapters, one by one"]
    rows = [[name, f"{rate:.1f}", f"{rate / one_by_one:.2f}"] for name, rate in rates.items()]
    print(markdown_table(["", "tokens/s", "times one by one"], rows))
    if given.json:
        print(json.dumps({"tokens_per_s": rates, "memory": memory}))


if __name__ == "__main__":
    main()
