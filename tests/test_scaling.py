"""benchmarks/scaling.py: operations against those that PyTorch counts, step times against a calculation by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adapter.adaption import AdaptionConfig
from adapter.decoder import Decoder, RMSNorm
from adapter.decoder_config import DecoderConfig
from benchmarks.scaling import A100, CHECKED, Device, Link, Work, step_time

LINK = Link(bytes_per_s=1e9, hop_s=1e-3)
SLOW = Link(bytes_per_s=1e8, hop_s=1e-2)
CPU = Device(
    flops_per_s=1e9,
    utilisation=1.0,
    memory_bytes_per_s=math.inf,
    launch_s=0.0,
    gather_s=1e-4,
    per_node=2,
    inside=LINK,
    between=SLOW,
    overlaps=False,
)
LENGTHS = [17] * 6


def took(workers: int, stage: int, device: Device = CPU) -> tuple[float, float, float]:
    step = step_time(CHECKED, device, LENGTHS, 1.0, 6 * 17, workers, stage)
    return step.compute, step.reduce, step.gather


def test_operations_are_those_that_pytorch_counts() -> None:
    rows, length, labelled, adapted = 3, 17, 10, 3
    shape = DecoderConfig(dim=64, n_layers=5, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=97)
    model = Decoder(shape)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.reset_parameters()
    model.add_adapter(AdaptionConfig(n_layers=adapted, prompt_length=1))
    tokens = torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = torch.arange(rows)  # no two rows begin alike
    labels = tokens.clone()
    labels[:, : length - labelled] = -100
    with FlopCounterMode(display=False) as counted:
        model(tokens, labels).backward()
    matrices = counted.get_flop_counts()["Global"][torch.ops.aten.mm]

    work = Work(shape=shape, adapted=adapted, prompt_length=1, weight_bytes=4)
    attention = 2 * 64 * rows * length**2 * (5 + 2.5 * adapted)
    lowest = 2 * rows * (length - 1) * 64 * (64 + 2 * 32)  # the lowest adapted layer's input needs no gradient
    prompts = adapted * 2 * 2 * 64 * (2 * 32)  # each prompt's key and value, forward and backward
    assert work.operations(rows, length, rows * labelled) - attention - lowest + prompts == matrices


def test_one_worker_computes_and_under_zero_3_prepares_its_gathers() -> None:
    seconds = CHECKED.operations(6, 17, 6 * 17) / 1e9
    assert took(1, 2) == pytest.approx((seconds, 0, 0))
    assert took(1, 3) == pytest.approx((seconds + 98 * 1e-4, 0, 0)), "7 matrices, 8 layers forward and 6 backward"


def test_two_workers_halve_the_computation_and_add_the_link() -> None:
    half = CHECKED.operations(3, 17, 3 * 17) / 1e9
    adapter = 4 * 6 * (10 * 512 + 8)
    assert took(2, 2) == pytest.approx((half, adapter / 1e9 + 2e-3, 0))
    matrices = 4 * (4 * 512**2 + 3 * 512 * 1376) * (8 + 6)
    assert took(2, 3)[2] == pytest.approx(matrices / 2 / 1e9 + 98 * 1e-3)


def test_only_the_hops_that_leave_a_node_are_charged_its_network() -> None:
    assert CPU.ring_s(6) == pytest.approx(2 * 1e-2 + 3 * 1e-3)
    assert CPU.tree_s(8) == pytest.approx(2 * 1e-2 + 1e-3)
    assert (CPU.ring_s(1), CPU.tree_s(1)) == (0, 0)


def test_a_gpu_hides_gathers_and_the_hosts_time_behind_computation_of_that_length() -> None:
    idle = replace(A100, flops_per_s=1e13, gather_s=0.0, inside=LINK)
    compute, _, waited = took(2, 3, idle)
    assert compute == pytest.approx(10e-3), "the host's launches take longer than the computation"
    joined = 2 * 4 * (4 * 512**2 + 3 * 512 * 1376) * (8 + 6) / A100.memory_bytes_per_s
    assert waited == pytest.approx(took(2, 3)[2] + joined - compute + compute / 8)
    assert took(2, 3, replace(idle, gather_s=1e-3))[0] == pytest.approx(10e-3 + 98e-3)
