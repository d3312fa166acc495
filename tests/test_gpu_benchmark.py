"""benchmarks/gpu.py: its parts run at a tiny size on a CPU, and its shares are those of a calculation by hand."""

import statistics

import pytest

from benchmarks import gpu, gpu_parts, gpu_training
from benchmarks.gpu_setup import SIZES

TINY = SIZES["tiny"]


def test_parts_measure_at_a_tiny_size() -> None:
    records = gpu_training.make_records(TINY, 2 * TINY.batch, None, None)
    trained = gpu_training.train(TINY, "cpu", "bf16", records, with_zero=False)
    assert 0 < trained["computed_share"] < 1  # the records share a prefix
    assert trained["paper_minutes"] == pytest.approx(52_002 * 5 / trained["records_per_s"] / 60)
    results = {
        "machine": gpu_parts.machine(TINY, "cpu"),
        "train": trained,
        "decode": gpu_parts.decode(TINY, "cpu"),
        "encode": gpu_parts.encode(TINY, "cpu"),
        "search": gpu_parts.search(TINY, "cpu"),
    }
    shares = gpu.rounded(gpu.compare(results))
    assert shares["train"]["share_of_peak"] > 0
    assert shares["decode"]["batch_3"]["share_of_floor"] > 0
    assert shares["encode"]["bf16"]["share_of_peak"] > 0
    assert 0.2 < shares["search"]["accuracy"] <= 1


def test_shares_are_of_what_the_machine_gave() -> None:
    results = {
        "machine": {"flops_per_s": 200.0, "read_bytes_per_s": 50.0},
        "train": {"flops_per_s": 110.0},
        "nf4": {"error": "stopped"},
        "decode": {"bytes_per_step": 10, "batch_4": {"tokens_per_s": 12.0}},
        "encode": {"fp32": {"flops_per_s": 20.0}},
    }
    shares = gpu.compare(results)
    assert shares["train"]["share_of_peak"] == 0.55
    assert shares["decode"]["batch_4"]["share_of_floor"] == 0.6  # a token of each of 4 rows is read for in 0.2 s
    assert shares["encode"]["fp32"]["share_of_peak"] == 0.1
    assert shares["nf4"] == {"error": "stopped"}
    assert "share_of_peak" not in shares["machine"]


def test_lengths_without_a_file_are_those_that_are_stated() -> None:
    records = gpu_training.make_records(SIZES["7b"], 3000, None, None)
    lengths, labels = [len(record.ids) for record in records], [record.n_labels for record in records]
    assert max(lengths) <= 512
    assert statistics.mean(lengths) == pytest.approx(130, abs=4)
    assert sum(labels) / sum(lengths) == pytest.approx(0.53, abs=0.02)
