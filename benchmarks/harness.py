"""Measure log-likelihood requests of lm-evaluation-harness: ours against the harness's own backend for transformers.

SmolLM2-135M-Instruct in fp32 scores four options to each of some questions, after as many answered examples as the
harness puts before them, the same before every question. Both have the harness's own encoding, and take turns:

    ours    batches of 8,192 tokens, of which equal beginnings are computed once, with prepacked weights
    hf      the harness's HFLM, with batches of 16 requests; it computes an option of one token once for all options

    python -m benchmarks.harness [--questions 16] [--shots 0 5] [--rounds 1] [--words 1 6]

Times are processor seconds of one thread, which other programs disturb least. The largest difference between the two
backends' log-likelihoods is printed too.
"""

import argparse
import random
import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapter import AdaptedModel
from rayjobs.inference.harness_model import harness_lm
from rayjobs.reporting.tables import markdown_table
from tests.real_models import smollm2

WORDS = ["river", "stone", "bread", "cloud", "engine", "garden", "winter", "letter", "music", "silver", "market"]


def make_requests(questions: int, shots: int, words: int) -> list[Any]:
    """Four options of so many words to each question."""
    rng = random.Random(0)

    def text(n: int) -> str:
        return " ".join(rng.choices(WORDS, k=n))

    examples = "".join(f"Question: {text(24)}?\nAnswer: {text(words)}\n\n" for _ in range(shots))
    contexts = [f"{examples}Question: {text(24)}?\nAnswer:" for _ in range(questions)]
    return [SimpleNamespace(args=(context, f" {text(words)}")) for context in contexts for _ in range(4)]


def ours() -> Any:
    """The harness's model over ours, in this process."""
    model = AdaptedModel.from_pretrained(smollm2())
    model.prepack_weights()

    def compute(kind: str, task: Any, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        parts = [records[start : start + 64] for start in range(0, len(records), 64)]
        return [row for part in parts for row in task(model, part, [None] * len(part))]

    return harness_lm(model.tokenizer, None, model.model.config.max_seq_len, compute)


def theirs() -> Any:
    """The harness's own model."""
    from lm_eval.models.huggingface import HFLM

    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    return HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(smollm2()), batch_size=16)


def score(lm: Any, requests: list[Any]) -> tuple[float, list[float]]:
    """The processor seconds that a backend takes for requests, and their log-likelihoods."""
    start = time.process_time()
    found = lm.loglikelihood(requests, disable_tqdm=True)
    return time.process_time() - start, [value for value, _ in found]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 5])
    parser.add_argument("--words", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    backends, rows = {"ours": ours(), "hf": theirs()}, []
    for shots in args.shots:
        for words in args.words:
            requests = make_requests(args.questions, shots, words)
            times: dict[str, list[float]] = {name: [] for name in backends}
            found: dict[str, list[float]] = {}
            for _ in range(args.rounds):
                for name, lm in backends.items():
                    spent, found[name] = score(lm, requests)
                    times[name].append(spent)
            mine, other = (len(requests) / statistics.median(times[name]) for name in ("ours", "hf"))
            apart = max(abs(a - b) for a, b in zip(found["ours"], found["hf"], strict=True))
            what = f"{shots} examples, options of {words} word{'s' * (words > 1)}"
            rows.append([what, f"{mine:.2f}", f"{other:.2f}", f"{mine / other:.2f}", f"{apart:.1e}"])
    print(markdown_table(["requests per second", "ours", "hf", "times", "largest difference"], rows))


if __name__ == "__main__":
    main()
