"""All adapter methods do what an adapter must: start as the base, train what they say alone, come off, and be saved."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapter import AdaptedModel
from adapter.adapter_file import apply_adapter, check_adapter_fits, extract_adapter
from adapter.adapter_formats import read_adapter
from adapter.base.quantization import PRECISIONS, set_weight
from adapter.decoder import Decoder
from adapter.errors import AdapterError, CheckpointError
from adapter.generate import generate
from adapter.methods import registry
from adapter.methods.base import AdapterMethod
from adapter.methods.full import FullConfig
from adapter.methods.lora import LoraConfig
from adapter.methods.v2 import V2Config
from tests.adapter.methods.samples import LINEARS, METHODS, SMALL, SMALLER, add, base
from tests.adapter.models import tokens

IDS = tokens(2, 13, SMALL["vocab_size"])
EVERY = {**METHODS, **{f"{name}, smaller": method for name, method in SMALLER.items()}}
IDENTITIES = [method for name, method in EVERY.items() if name not in ("rand_init", "prefix")]
UNLOCKED = {f"layers.{i}.{norm}.shift.d" for i in range(3) for norm in ("attention_norm", "ffn_norm")} | {
    "norm.shift.d"
}


def test_the_names_are_those_of_the_methods() -> None:
    assert {name: method.method for name, method in METHODS.items()} == {name: name for name in registry.METHODS}
    assert {name: type(method) for name, method in METHODS.items()} == dict(registry.METHODS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", IDENTITIES, ids=lambda method: method.describe())
def test_a_fresh_adapter_changes_no_bit(method: AdapterMethod, dtype: torch.dtype) -> None:
    model = base(dtype)
    expected = model(IDS)
    assert torch.equal(add(model, method, trained=False)(IDS), expected)


def trainable_names(name: str) -> set[str]:
    deltas = [f"layers.{i}.{part}.{w}.delta" for i in range(3) for part, ws in (
        ("attention", LINEARS[:4]), ("feed_forward", LINEARS[4:])) for w in ws]  # fmt: skip
    prompts = {f"layers.{i}.attention.adaption.prompt" for i in (1, 2)}
    gates = {f"layers.{i}.attention.adaption.gate" for i in (1, 2)}
    return {
        "zero_init": prompts | gates,
        "rand_init": prompts,
        "prefix": prompts,
        "v2": prompts | gates | UNLOCKED | {f"{one}.{x}" for one in deltas for x in "db"},
        "lora": {f"{one}.{x}" for one in deltas for x in "ab"},
        "ia3": {f"{one}.d" for one in deltas if one.split(".")[-2] in ("wk", "wv", "w3")},
        "bias": {f"{one}.b" for one in deltas},
        "full": {name for name, _ in base().named_parameters()},
    }[name]


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_reaches_what_is_trained_and_nothing_else(name: str) -> None:
    model = add(base(), METHODS[name], trained=False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == trainable_names(name)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.01)
    for _ in range(3):
        model(IDS, IDS).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trained
    assert all(before[name].dtype == torch.float32 for name in trained)


@pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)
def test_an_adapter_comes_off_to_the_bit_or_says_that_it_cannot(method: AdapterMethod) -> None:
    model = base()
    expected = model(IDS)
    assert not torch.equal(add(model, method)(IDS), expected)
    if method.trains_base:
        with pytest.raises(AdapterError, match=r"full changes the base's own weights.*load the base again"):
            model.remove_adapter()
        with pytest.raises(AdapterError, match="load the base again"):
            model.add_adapter(LoraConfig())
        return
    model.add_adapter(LoraConfig(targets=("wo",)))  # takes the place of all parts
    assert {name.split(".", 3)[-1] for name, _ in model.adapter_parameters()} == {"wo.delta.a", "wo.delta.b"}
    model.remove_adapter()
    assert torch.equal(model(IDS), expected)
    assert dict(model.named_parameters()).keys() == dict(base().named_parameters()).keys()


@pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)
def test_a_saved_adapter_computes_the_same_on_its_base_alone(method: AdapterMethod, tmp_path: Path) -> None:
    model, path = add(base(), method), tmp_path / "a.safetensors"
    file = extract_adapter(model, base_fingerprint="f1", tokenizer_sha256="t1")
    file.save(path)
    again = read_adapter(path)
    assert again.config == method
    assert again.trainable == sum(one.numel() for one in model.parameters() if one.requires_grad)
    fresh = base()
    apply_adapter(fresh, again, fingerprint="f1", tokenizer_sha256="t1")
    assert torch.equal(fresh(IDS), model(IDS))
    with pytest.raises(CheckpointError, match="same shape but other weights"):
        check_adapter_fits(again, model.config, fingerprint="f2")
    with pytest.raises(CheckpointError, match="another base: it wants hidden_dim 37, this base has 41"):
        check_adapter_fits(again, replace(model.config, hidden_dim=41))


def test_damaged_files_of_a_method_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "a.safetensors", add(base(), LoraConfig(rank=3))
    extract_adapter(model).save(path)
    with safe_open(path, framework="pt") as file:
        good = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for header, message in (
        ({"method": "magic"}, "no method 'magic': there are zero_init"),
        ({"settings": '{"rank": 0}'}, "LoRA needs rank >= 1"),
        ({"settings": '{"rnk": 1}'}, "lora has no settings .*rnk"),
        ({"method": "v2", "settings": '{"variant": "chat"}'}, "chat"),
        ({"settings": "["}, "header is damaged"),
    ):
        save_file(tensors, path, metadata={**good, **header})
        with pytest.raises(CheckpointError, match=message):
            read_adapter(path)
    name = "layers.1.attention.wq.delta.a"
    for changed, message in (
        ({key: tensor for key, tensor in tensors.items() if key != name}, f"{name} should have .*and has none"),
        ({**tensors, "norm.weight": torch.ones(24)}, "norm.weight should have the shape of nothing"),
        ({**tensors, name: torch.ones(2, 24)}, rf"no lora of this base: {name} should have the shape \(3, 24\)"),
    ):
        save_file(changed, path, metadata=good)
        with pytest.raises(CheckpointError, match=message):
            apply_adapter(model, read_adapter(path))
    assert model.adapter == LoraConfig(rank=3)


def quantized(precision: str) -> Decoder:
    model = base()
    for name, parameter in list(model.named_parameters()):
        set_weight(model, name, parameter.detach(), PRECISIONS[precision]._replace(dtype=torch.float32))
    return model


@pytest.mark.parametrize(
    ("name", "precision"), [("lora", "nf4"), *((name, "int8") for name in METHODS if name != "full")]
)
def test_adapters_work_on_a_quantized_base(name: str, precision: str) -> None:
    """As on a plain base whose weights are the dequantized ones."""
    model, plain = quantized(precision), base()
    for path, layer in model.named_modules():
        if hasattr(layer, "dequantize"):
            plain.get_parameter(f"{path}.weight").data = layer.dequantize(torch.float32)
    gradients = []
    for one in (model, plain):
        add(one, METHODS[name])
        one(IDS, IDS).backward()
        gradients.append({name: p.grad for name, p in one.adapter_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)
    model.remove_adapter()
    plain.remove_adapter()
    torch.testing.assert_close(model(IDS), plain(IDS), rtol=1e-5, atol=1e-5)


def test_full_fine_tuning_needs_full_precision(tmp_path: Path) -> None:
    file = extract_adapter(add(base(), FullConfig()))
    with pytest.raises(CheckpointError, match="all weights of its base, which a base in nf4 cannot take"):
        apply_adapter(quantized("nf4"), file)
    half = base(torch.bfloat16)
    apply_adapter(half, file)  # to use it in half precision is another matter
    with pytest.raises(AdapterError, match="needs a base in fp32, this one is held in bf16, in which small updates"):
        FullConfig().check_precision("bf16")


@pytest.mark.parametrize("name", ["lora", "v2", "full"])
def test_recomputed_activations_give_the_same_gradients(name: str) -> None:
    gradients = []
    for recompute in (False, True):
        model = add(base(), METHODS[name])
        model.checkpoint_activations = recompute
        model(IDS, IDS).backward()
        gradients.append({name: one.grad for name, one in model.adapter_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["lora", "v2", "full"])
def test_generation_goes_on_as_the_whole_text_does(name: str) -> None:
    """Greedily, each token is the likeliest one after all tokens before it, computed without a cache."""
    model, prompts = add(base(), METHODS[name]), [IDS[0, :5].tolist(), IDS[1, :9].tolist()]
    answers = generate(model, prompts, eos_ids=(), max_new_tokens=6, temperature=0.0)
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
        assert answer == logits.argmax(-1).tolist()


@pytest.mark.parametrize(("made", "message"), [
    (lambda: registry.make_method("adapters"), "no adapter method 'adapters': there are zero_init, rand_init"),
    (lambda: LoraConfig(targets=()), "LoRA needs .*targets of wq, wk"),
    (lambda: LoraConfig(n_layers=0), "needs n_layers >= 1, got 0"),
    (lambda: V2Config(variant="multimodal7b"), "as in its paper, .*not as in 'multimodal7b'"),
    (lambda: base().add_adapter(LoraConfig(n_layers=4)), "wants 4 adapted layers, the base has 3"),
])  # fmt: skip
def test_settings_that_are_refused(made, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        made()


@pytest.mark.parametrize("name", ["lora", "v2", "full"])
def test_the_model_class_takes_every_method(name: str, tiny_base: Path, tmp_path: Path) -> None:
    model = AdaptedModel.from_pretrained(tiny_base)
    before = model.logits("to be")[0]
    model.add_adapter(METHODS[name])
    assert torch.equal(model.logits("to be")[0], before)
    with torch.no_grad():
        for _, parameter in model.model.adapter_parameters():
            parameter += 0.05
    said = model.generate("to be", max_new_tokens=5, temperature=0.0)
    model.save_adapter(tmp_path / "a.safetensors")
    again = AdaptedModel.from_pretrained(tiny_base)
    again.load_adapter(tmp_path / "a.safetensors")
    assert torch.equal(again.logits("to be")[0], model.logits("to be")[0])
    assert again.generate("to be", max_new_tokens=5, temperature=0.0) == said
