"""Quantized layers equal the library's own, and a decoder made of them equals one whose weights are dequantized:
outputs, gradients, generated ids and, by computation, bytes."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter.adapter_file import apply_adapter, extract_adapter
from adapter.adapter_formats import read_adapter
from adapter.adaption import AdaptionConfig
from adapter.base.binding import meta_decoder
from adapter.base.checkpoint import load_decoder, open_checkpoint, save_decoder
from adapter.base.memory import base_bytes
from adapter.base.quantization import PRECISIONS, Int8Linear, NF4Linear, precision_of
from adapter.decoder import Decoder
from adapter.decoder_config import DecoderConfig
from adapter.errors import AdapterError, CheckpointError
from adapter.generate import generate
from adapter.linear import Linear
from tests.adapter.models import llama, randomise, tokens

bitsandbytes = pytest.importorskip("bitsandbytes")

SHAPE = {
    "dim": 60, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "hidden_dim": 74, "vocab_size": 101, "max_seq_len": 47,
}  # fmt: skip
LLAMA_7B = DecoderConfig(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, hidden_dim=11008, vocab_size=32000)
ADAPTION = AdaptionConfig(n_layers=2, prompt_length=5)
KINDS = ("int8", "nf4")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_decoder(llama(SHAPE), folder)
    return folder


@pytest.fixture(scope="module")
def biased_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with biases."""
    folder = tmp_path_factory.mktemp("biased")
    save_decoder(llama({**SHAPE, "qkv_bias": True}), folder)
    return folder


def adapted(base: Path, quantization: str | None, dtype: torch.dtype = torch.float32) -> Decoder:
    model = load_decoder(base, dtype=dtype, quantization=quantization)
    model.add_adapter(ADAPTION)
    randomise(nn.ModuleList(model.adaptions), seed=1)
    return model


def dequantized(model: Decoder) -> Decoder:
    """The same model with ordinary linear layers, whose weights the library dequantized."""
    plain = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear | NF4Linear):
            weight = module.dequantize(torch.float32)
            linear = Linear(*reversed(weight.shape), bias=module.bias is not None)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.bias = module.bias
            plain.set_submodule(name, linear)
    return plain


def library_layer(kind: str, weight: Tensor, bias: Tensor) -> nn.Module:
    if kind == "nf4":
        layer = bitsandbytes.nn.Linear4bit(*reversed(weight.shape), quant_type="nf4", compute_dtype=torch.float32)
        layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        layer = bitsandbytes.nn.Linear8bitLt(*reversed(weight.shape), has_fp16_weights=False, threshold=0.0)
        layer.weight = bitsandbytes.nn.Int8Params(weight.clone(), has_fp16_weights=False, requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer.to("cpu").train()  # moving it quantizes


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_equals_the_librarys_own(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    # Values that float16 holds exactly: the library quantizes int8 from float16, whatever it is given.
    weight = (torch.randn(74, 118, generator=generator) * 0.1).half().float()
    bias = torch.randn(74, generator=generator)
    theirs, cls = library_layer(kind, weight, bias), {"int8": Int8Linear, "nf4": NF4Linear}[kind]
    ours = cls(weight.to(cls.QUANTIZED_FROM), nn.Parameter(bias, requires_grad=False))
    x = torch.randn(3, 7, 118, generator=generator)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    upstream = torch.randn(3, 7, 74, generator=generator)
    y, expected = ours(ours_x), theirs(theirs_x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, rtol=1e-5, atol=1e-5)
    held = ours.dequantize(torch.float32)
    torch.testing.assert_close(y, F.linear(x, held, bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours_x.grad, upstream @ held, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours(x), y), "the same without gradients"
    assert {name for name, _ in ours.named_parameters()} == {"bias"}


def test_a_held_weight_is_as_near_as_its_bits_allow() -> None:
    weight = torch.randn(74, 128, generator=torch.Generator().manual_seed(0))
    int8 = Int8Linear(weight.half()).dequantize(torch.float32)
    half_step = weight.abs().amax(1, keepdim=True) / 254
    assert ((int8 - weight).abs() <= half_step * 1.01 + weight.abs() * 2**-11).all()
    nf4 = NF4Linear(weight).dequantize(torch.float32)
    largest = weight.view(-1, 64).abs().amax(1, keepdim=True)  # widest gap of NF4: 0.7230 to 1
    assert ((nf4 - weight).view(-1, 64).abs() <= largest * 0.17).all()
    for cls in (Int8Linear, NF4Linear):
        nothing = cls(torch.zeros(6, 128, dtype=cls.QUANTIZED_FROM))
        assert torch.equal(nothing(torch.ones(2, 128)), torch.zeros(2, 6))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["base", "biased_base"])
def test_a_quantized_decoder_equals_its_dequantized_copy(request: pytest.FixtureRequest, which: str, kind: str) -> None:
    base = request.getfixturevalue(which)
    model = adapted(base, kind)
    plain = dequantized(model)
    ids = tokens(3, 19)
    assert precision_of(model) == kind
    assert precision_of(plain) == "fp32"
    assert not torch.equal(plain(ids), adapted(base, None)(ids)), "quantizing changed something"
    torch.testing.assert_close(model(ids), plain(ids), rtol=1e-4, atol=1e-4)
    for one in (model, plain):
        one(ids, ids).backward()
    ours, expected = ({n: p.grad for n, p in one.adapter_parameters()} for one in (model, plain))
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().min() > 0, name
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-3, msg=name)
    prompts = [[1, 7, 30], [2, 19, 11, 4, 23]]
    new_ids = [generate(one, prompts, eos_ids={100}, max_new_tokens=13, temperature=0.0) for one in (model, plain)]
    assert new_ids[0] == new_ids[1]


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_change_nothing(base: Path, kind: str) -> None:
    gradients = []
    for recompute in (False, True):
        model = adapted(base, kind, torch.bfloat16)
        model.checkpoint_activations = recompute
        model(tokens(3, 19), tokens(3, 19)).backward()
        gradients.append([parameter.grad for _, parameter in model.adapter_parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_only_the_linear_layers_of_the_blocks_are_quantized(base: Path) -> None:
    model = load_decoder(base, dtype=torch.bfloat16, quantization="nf4")
    left = {name for name, _ in meta_decoder(model.config).named_parameters()} - dict(model.named_parameters()).keys()
    linears = {"attention.wq", "attention.wk", "attention.wv", "attention.wo"} | {
        f"feed_forward.w{i}" for i in (1, 2, 3)
    }
    assert left == {f"layers.{layer}.{linear}.weight" for layer in range(3) for linear in linears}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(tokens(2, 7)).dtype == torch.bfloat16


@pytest.mark.parametrize("switches", [{}, {"tied_head": True}, {"qkv_bias": True}])
@pytest.mark.parametrize("name", PRECISIONS)
def test_the_bytes_of_a_base_are_known_before_it_is_loaded(tmp_path: Path, name: str, switches: dict) -> None:
    dtype, quantization = PRECISIONS[name]
    save_decoder(llama({**SHAPE, **switches}), tmp_path)
    model = load_decoder(tmp_path, dtype=dtype, quantization=quantization)
    held = [*model.parameters(), *model.buffers()]
    assert sum(tensor.nbytes for tensor in held) == base_bytes(model.config, dtype, quantization)
    assert precision_of(model) == name


def saved_bytes(model: Decoder, ids: Tensor) -> int:
    """Bytes that autograd keeps between the forward and the backward pass, weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, ids)
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_training_7b_in_nf4_takes_less_than_8_gib() -> None:
    """The weights are counted exactly. What autograd keeps is measured on a narrow layer of the same proportions, where
    it grows with width, tokens and layers alike."""
    weights = base_bytes(LLAMA_7B, *PRECISIONS["nf4"])
    assert base_bytes(LLAMA_7B, *PRECISIONS["bf16"]) == 2 * 6_738_415_616
    narrow = DecoderConfig(dim=128, n_layers=3, n_heads=1, n_kv_heads=1, hidden_dim=344, vocab_size=101)
    n_tokens, kept = 512, []
    for n_layers in (1, 2):
        model = Decoder(narrow).bfloat16()
        model.add_adapter(AdaptionConfig(n_layers=n_layers, prompt_length=10))
        kept.append(saved_bytes(model, tokens(1, n_tokens)))
    activations = 30 * (kept[1] - kept[0]) * (LLAMA_7B.dim // narrow.dim)
    one_weight = LLAMA_7B.dim * LLAMA_7B.hidden_dim * 2  # dequantized while it is used, and its gradient's input
    logits = 512 * LLAMA_7B.vocab_size * 4 * 3
    adapter = 30 * (10 * LLAMA_7B.dim + LLAMA_7B.n_heads) * 4 * 4  # with gradient and two moments
    total = weights + activations + 2 * one_weight + logits + adapter
    assert 3.5 * 2**30 < weights < 4 * 2**30
    assert activations > n_tokens * 30 * LLAMA_7B.dim * 2
    assert total < 8 * 2**30, f"{total / 2**30:.2f} GiB, {activations / 2**30:.2f} of them activations"


def test_an_adapter_moves_between_precisions(base: Path, tmp_path: Path) -> None:
    fingerprint = open_checkpoint(base).fingerprint()
    for source, target in (("nf4", None), (None, "nf4"), ("int8", "nf4")):
        trained = adapted(base, source)
        extract_adapter(trained, base_fingerprint=fingerprint).save(tmp_path / "adapter.safetensors")
        other = load_decoder(base, quantization=target)

        file = read_adapter(tmp_path / "adapter.safetensors")
        assert file.base_dtype == (source or "fp32")
        apply_adapter(other, file, fingerprint=fingerprint)
        for one, two in zip(trained.adapter_parameters(), other.adapter_parameters(), strict=True):
            assert one[0] == two[0]
            assert torch.equal(one[1], two[1])


def test_a_quantized_base_cannot_be_saved_and_damaged_weights_are_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"held in int8.*save one loaded in fp32"):
        save_decoder(load_decoder(base, quantization="int8"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model = load_decoder(base)
    model.layers[1].feed_forward.w3.weight.data[2, 3] = 1e6  # more than float16 holds
    save_decoder(model, tmp_path)
    load_decoder(tmp_path, quantization="nf4")
    with pytest.raises(CheckpointError, match=r"layers\.1\.feed_forward\.w3\.weight holds infinity \(in float16\)"):
        load_decoder(tmp_path, quantization="int8")


def test_a_missing_library_is_named_with_the_command_that_installs_it(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(AdapterError, match=r"bitsandbytes.*pip install 'rayjobs\[quantization\]'"):
        load_decoder(base, quantization="nf4")


MEMORY = """
import sys, torch
from adapter.base.checkpoint import load_decoder

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))

small, big, quantization = sys.argv[1:]
load_decoder(small, quantization=quantization)  # what loading imports and touches once
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the high-water mark starts again from here
before = status("VmRSS")
model = load_decoder(big, quantization=quantization)
held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
print(held, status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc to measure memory")
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_model_is_never_in_memory(base: Path, tmp_path: Path, kind: str) -> None:
    """All resident memory counts, mapped pages of the file too: the bound is the quantized model and some copies of its
    largest tensor, far below the model in float32."""
    config = DecoderConfig(dim=512, n_layers=12, n_heads=8, n_kv_heads=8, hidden_dim=1366, vocab_size=502)
    big = Decoder(config)
    randomise(big)
    save_decoder(big, tmp_path)
    whole, largest = base_bytes(config, torch.float32), 512 * 1366 * 4
    assert whole > 140e6
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, base, tmp_path, kind],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "kernel" not in done.stderr, "the library's import speaks of an optional kernel that is not used here"
    held, peak = map(int, done.stdout.split())
    assert held == base_bytes(config, torch.float32, kind)
    assert peak < 1.1 * held + 9 * largest < 0.5 * whole, (held, peak, whole)
