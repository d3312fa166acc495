"""A transformers model with an adapter computes what ours computes, and is what it was once the adapter is detached."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapter.adapter_file import AdapterFile, apply_adapter, extract_adapter
from adapter.adapter_formats import read_adapter
from adapter.adaption import AdaptionConfig, Gate
from adapter.base.checkpoint import load_decoder, open_checkpoint
from adapter.decoder import Decoder
from adapter.errors import AdapterError, CheckpointError
from adapter.generate import generate
from adapter.generation_config import GenerationConfig
from adapter.hf import attach
from adapter.image_projection import ImageProjectionConfig
from adapter.loss import IGNORE

VOCAB, DIM, HEADS, KV_HEADS, HIDDEN, LAYERS, L, K, WIDTH = 31, 24, 4, 2, 37, 5, 3, 7, 11
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": DIM, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 64,
    "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LONG, SHORT = [1, 7, 30, 3, 19, 11, 4, 23, 8, 5, 13], [1, 17, 29, 12, 6]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 3, "head_dim": 10},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 3},
    "qwen3": {"head_dim": 10},
    "gemma2": {"head_dim": 10, "sliding_window": 3, "query_pre_attn_scalar": 13, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 10, "sliding_window": 3, "query_pre_attn_scalar": 13, "sliding_window_pattern": 2},
    "smollm3": {},
}


def build(family: str = "llama", attention: str = "sdpa", **changes: Any) -> Any:
    """A tiny random model of transformers, of which no weight is trivial."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def adapter_for(decoder: Decoder, gate: Gate = "tanh", vision: ImageProjectionConfig | None = None) -> AdapterFile:
    """Put an adapter with open gates on our decoder, and return its content."""
    config = AdaptionConfig(n_layers=L, prompt_length=K, gate=gate, vision=vision)
    decoder.add_adapter(config, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for adaption in decoder.adaptions:
            if adaption.gate.requires_grad:
                adaption.gate.uniform_(-0.9, 0.9)
    return extract_adapter(decoder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama."""
    folder = tmp_path_factory.mktemp("llama")
    build().save_pretrained(folder)
    return folder


@pytest.fixture
def decoder(llama: Path) -> Decoder:
    return load_decoder(llama)


@pytest.fixture
def model(llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama).eval()


def batch(padding: str) -> dict[str, Tensor]:
    """Both texts, padded on one side."""
    fill = [0] * (len(LONG) - len(SHORT))
    short, mask = (SHORT + fill, [1] * len(SHORT) + fill) if padding == "right" else (fill + SHORT, fill + [1] * 5)
    return {"input_ids": torch.tensor([LONG, short]), "attention_mask": torch.tensor([[1] * len(LONG), mask])}


@torch.no_grad()
def logits(model: Any, ids: list[int] = LONG) -> Tensor:
    out = model(torch.tensor([ids]))
    return out if isinstance(out, Tensor) else out.logits


def ours_greedy(decoder: Decoder, n_tokens: int, **given: Any) -> list[list[int]]:
    """Our decoder's greedy continuations of both texts."""
    config = GenerationConfig(max_new_tokens=n_tokens, temperature=0)
    return generate(decoder, [LONG, SHORT], config, eos_ids={2}, **given)


def close(left: Tensor, right: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


PAIRS = [(family, attention) for family in FAMILIES for attention in ("eager", "sdpa")]


@pytest.mark.parametrize(("family", "attention"), [pair for pair in PAIRS if pair != ("gemma2", "sdpa")])
def test_logits_of_every_family_are_ours(family: str, attention: str, tmp_path: Path) -> None:
    """transformers itself refuses Gemma 2's soft caps under SDPA."""
    theirs = build(family, attention)
    theirs.save_pretrained(tmp_path)
    ours = load_decoder(tmp_path)
    assert bool(ours.config.switches()) == (family != "llama")  # which `attach` compares
    bare = logits(theirs)
    close(bare, logits(ours))
    attach(theirs, adapter_for(ours))
    close(logits(theirs), logits(ours))
    assert (logits(theirs) - bare).abs().max() > 0.1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("gate", ["tanh", "identity", "one", "prefix"])
def test_every_gate_with_and_without_cache_and_padding(gate: Gate, attention: str, llama: Path) -> None:
    ours = load_decoder(llama)
    theirs = AutoModelForCausalLM.from_pretrained(llama, attn_implementation=attention).eval()
    attach(theirs, adapter_for(ours, gate))
    close(logits(theirs), logits(ours))
    for padding in ("left", "right"):
        with torch.no_grad():
            padded = theirs(**batch(padding)).logits
        close(padded[0], logits(ours)[0])
        close(padded[1, -5:] if padding == "left" else padded[1, :5], logits(ours, SHORT)[0])
    with torch.no_grad():
        start = theirs(torch.tensor([LONG[:6]]), use_cache=True)
        rest = theirs(torch.tensor([LONG[6:]]), past_key_values=start.past_key_values)
    close(torch.cat([start.logits, rest.logits], 1), logits(ours))


def test_generation_is_ours(model: Any, decoder: Decoder) -> None:
    attach(model, adapter_for(decoder))
    wanted = ours_greedy(decoder, 13)
    for cache in ("dynamic", "static"):
        out = model.generate(**batch("left"), max_new_tokens=13, do_sample=False, cache_implementation=cache)
        for row, ids in zip(out[:, len(LONG) :].tolist(), wanted, strict=True):
            assert row[: len(ids)] == ids
    given = {**batch("left"), "max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    beams = model.generate(**given)
    assert torch.equal(beams, model.generate(**given, use_cache=False))
    alone = model.generate(torch.tensor([SHORT]), max_new_tokens=5, num_beams=3, do_sample=False)
    assert beams[1, len(LONG) :].tolist()[: len(alone[0]) - len(SHORT)] == alone[0, len(SHORT) :].tolist()


def test_bfloat16(llama: Path) -> None:
    ours = load_decoder(llama, dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).eval()
    file = adapter_for(ours)
    handle = attach(theirs, file)
    wanted = logits(ours).float()
    close(logits(theirs).float(), wanted, atol=0.05 * float(wanted.abs().max()))
    theirs.to(torch.float32).to(torch.bfloat16)
    assert torch.equal(handle.content().prompt, file.prompt), "prompts stay in float32"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_ours(checkpointing: bool, model: Any, decoder: Decoder) -> None:
    model.requires_grad_(False)
    handle = attach(model, adapter_for(decoder))
    if checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    labels = torch.tensor([[IGNORE, *LONG[1:]]])
    (decoder(torch.tensor([LONG]), labels) / (len(LONG) - 1)).backward()
    model(torch.tensor([LONG]), labels=labels).loss.backward()
    wanted = [parameter.grad for _, parameter in decoder.adapter_parameters()]
    found = [parameter.grad for parameter in handle.parameters()]
    assert len(wanted) == len(found) == 2 * L
    for ours, theirs in zip(wanted, found, strict=True):
        close(theirs, ours)
        assert ours.abs().max() > 1e-4
    assert {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad} == {"prompt", "gate"}


def test_what_is_trained_further_can_be_saved(model: Any, decoder: Decoder, tmp_path: Path) -> None:
    before = adapter_for(decoder)
    model.requires_grad_(False)
    handle = attach(model, replace(before, tokenizer_sha256="t1"))
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    model(torch.tensor([LONG]), labels=torch.tensor([LONG])).loss.backward()
    optimizer.step()
    handle.save(tmp_path / "adapter.safetensors")
    after = read_adapter(tmp_path / "adapter.safetensors")
    assert after.tokenizer_sha256 == "t1"
    assert not torch.equal(after.prompt, before.prompt)
    assert not torch.equal(after.gate, before.gate)
    apply_adapter(decoder, after)
    close(logits(model), logits(decoder))


def test_detaching_restores_the_model_and_saving_ignores_the_adapter(
    model: Any, decoder: Decoder, tmp_path: Path
) -> None:
    before, names = logits(model), [name for name, _ in model.named_modules()]
    model.save_pretrained(tmp_path / "before")
    with attach(model, adapter_for(decoder)):
        assert not torch.equal(logits(model), before)
        model.save_pretrained(tmp_path / "with")
        model.load_state_dict(model.state_dict())
        again = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
        for one in again:
            assert torch.equal(logits(one), logits(model))
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / "with" / file.name).read_bytes() == file.read_bytes()
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_modules()] == names
    assert (model.config._attn_implementation, len(model.model._forward_pre_hooks)) == ("sdpa", 0)
    assert not model.model._forward_pre_hooks_with_kwargs


def test_a_second_adapter_takes_the_place_of_the_first(model: Any, decoder: Decoder) -> None:
    bare = logits(model)
    first = attach(model, adapter_for(decoder, "one"))
    second = attach(model, adapter_for(decoder))
    close(logits(model), logits(decoder))
    first.detach()  # no longer there
    close(logits(model), logits(decoder))
    second.detach()
    second.detach()
    assert torch.equal(logits(model), bare)


def test_another_model_with_the_same_configuration_is_untouched(model: Any, decoder: Decoder) -> None:
    other = transformers.LlamaForCausalLM(model.config).eval()
    bare = logits(other)
    attach(model, adapter_for(decoder))
    assert torch.equal(logits(other), bare)


def test_an_attention_that_is_changed_afterwards_stops_the_model(model: Any, decoder: Decoder) -> None:
    attach(model, adapter_for(decoder))
    model.set_attn_implementation("eager")
    with pytest.raises(AdapterError, match=r"set to 'eager' after the adapter.*attach the adapter again"):
        logits(model)
    attach(model, extract_adapter(decoder))
    close(logits(model), logits(decoder))


VISION = ImageProjectionConfig(widths=(4, 7), bottleneck=3)
FEATURES = [None, torch.linspace(-1, 2, WIDTH).sin()]


def test_images_of_rows_and_their_beams(model: Any, decoder: Decoder) -> None:
    handle = attach(model, adapter_for(decoder, vision=VISION))
    with torch.no_grad(), handle.images(FEATURES):
        tripled = model(**{name: x.repeat_interleave(3, dim=0) for name, x in batch("right").items()}).logits
        wanted = decoder(batch("right")["input_ids"], images=decoder.batch_images(FEATURES))
        for seen in (model(**batch("right")).logits, tripled[::3], tripled[1::3], tripled[2::3]):
            close(seen[0], wanted[0])
            close(seen[1, : len(SHORT)], wanted[1, : len(SHORT)])
        answers = ours_greedy(decoder, 5, images=FEATURES)
        generated = model.generate(**batch("left"), max_new_tokens=5, do_sample=False)
        for row, ids in zip(generated[:, len(LONG) :].tolist(), answers, strict=True):
            assert row[: len(ids)] == ids
        with handle.images(FEATURES[1:]):
            close(logits(model, SHORT)[0], wanted[1, : len(SHORT)])
        close(model(**batch("right")).logits[0], wanted[0])  # an inner block leaves the outer one its images
        with pytest.raises(AdapterError, match="3 rows cannot be shown the images of 2"):
            model(torch.tensor([SHORT] * 3))
    close(logits(model), logits(decoder))  # without images


def test_an_adapter_that_reads_images_is_saved_and_detached(model: Any, decoder: Decoder, tmp_path: Path) -> None:
    names = [name for name, _ in model.named_modules()]
    file = adapter_for(decoder, vision=VISION)
    handle = attach(model, file)
    assert len(list(handle.parameters())) == 2 * L + 4
    model.load_state_dict(model.state_dict())
    handle.save(tmp_path / "adapter.safetensors")
    saved = read_adapter(tmp_path / "adapter.safetensors").projection
    assert saved.keys() == file.projection.keys()
    assert all(torch.equal(saved[name], file.projection[name]) for name in saved)
    with pytest.raises(AdapterError, match="reads 11 features"), handle.images([torch.zeros(5)]):
        pass
    handle.detach()
    assert [name for name, _ in model.named_modules()] == names
    with pytest.raises(AdapterError, match="text alone"), attach(model, adapter_for(decoder)).images(FEATURES):
        pass


def test_a_wrong_base_or_tokenizer_is_refused(model: Any, decoder: Decoder, llama: Path) -> None:
    file = adapter_for(decoder)
    with pytest.raises(CheckpointError, match="wants hidden_dim 37, this base has 41"):
        attach(build(intermediate_size=41), file)
    with pytest.raises(CheckpointError, match=r"for a base with the switches .*qk_norm.*this base has \{\}"):
        attach(model, replace(file, base_switches={"qk_norm": True}))
    with pytest.raises(CheckpointError, match="other weights: fingerprint f2…"):
        attach(model, replace(file, base_fingerprint="f2"))
    attach(model, replace(file, base_fingerprint=open_checkpoint(llama).fingerprint()))
    attach(build(), replace(file, base_fingerprint="f2"))  # no folder to compare with

    class HasHash:
        sha256 = "t1"

    with pytest.raises(CheckpointError, match="another tokenizer: sha256 t2…, here t1…"):
        attach(model, replace(file, tokenizer_sha256="t2"), tokenizer=HasHash())


@pytest.mark.parametrize(("family", "changes", "message"), [
    ("gpt2", {"n_embd": 24, "n_layer": 2, "n_head": 4}, "GPT2LMHeadModel cannot take an adapter: it has no list"),
    ("phi3", SHAPE, "layer 0 has no separate projections"),
    ("gpt_oss", {**SHAPE, "num_local_experts": 2}, "layer 0 has sinks, which adapters do not know"),
    ("hunyuan_v1_dense", {**SHAPE, "head_dim": 6}, "layer 0 has key_layernorm, query_layernorm, which"),
    ("olmo2", SHAPE, r"layer 0 normalises its keys over \(12,\) channels"),
])  # fmt: skip
def test_models_that_cannot_take_an_adapter(
    family: str, changes: dict[str, Any], message: str, decoder: Decoder
) -> None:
    config = transformers.AutoConfig.for_model(family, **changes)
    with pytest.raises(AdapterError, match=message):
        attach(AutoModelForCausalLM.from_config(config), adapter_for(decoder))


def test_other_attention_functions_are_refused(model: Any, decoder: Decoder) -> None:
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(AdapterError, match=r"runs as 'flash_attention_2'.*attn_implementation='sdpa'"):
        attach(model, adapter_for(decoder))
