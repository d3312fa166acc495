"""V2's images: early fusion as its equations say, and disjoint parameters for records with an image and without."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapter.adapter_export import check_export
from adapter.adapter_file import apply_adapter, extract_adapter
from adapter.adapter_formats import read_adapter
from adapter.decoder import Decoder
from adapter.engine.adapters import AdapterStore
from adapter.engine.engine import Engine
from adapter.engine.request import Request
from adapter.errors import AdapterError
from adapter.generate import generate
from adapter.generation_config import GenerationConfig
from adapter.image_projection import ImageProjectionConfig
from adapter.merge import merge_adapter
from adapter.methods.v2 import V2Config
from tests.adapter import reference
from tests.adapter.methods.samples import SMALL, add, base
from tests.adapter.models import tokens

WIDTHS = (5, 11, 3)
VISION = ImageProjectionConfig(widths=WIDTHS, bottleneck=13, encoder="encoder-1")
METHOD = V2Config(n_layers=1, prompt_length=5, image_layers=2, vision=VISION)
IDS = tokens(3, 11, SMALL["vocab_size"])
IMAGE_GROUP = {f"layers.{i}.attention.adaption.gate" for i in (0, 1)} | {
    f"vision.{linear}.{one}" for linear in ("down", "up") for one in ("weight", "bias")
}


def features(count: int, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(count, sum(WIDTHS), generator=torch.Generator().manual_seed(seed)) * 9 + 2)


def naive(model: Decoder, ids: list[int], image: Tensor | None) -> Tensor:
    """Logits (T, V) by loops.

    y = s (W x + b) in every linear layer, norms w + d, one softmax for the words, and one for the prompt of the top
    layer or for the image's tokens in the two lowest.
    """
    config, state = model.config, {name: one.detach().double() for name, one in model.state_dict().items()}
    for name in [name for name in state if name.endswith("norm.weight")]:
        state[name] = state[name] + state[name.replace("weight", "shift.d")]
    prompts = {2: state["layers.2.attention.adaption.prompt"]}
    if image is not None:
        prompts |= dict.fromkeys((0, 1), reference.image_token(image, state, WIDTHS).view(5, config.dim))

    no_prompt = torch.zeros(1, config.dim, dtype=torch.float64)

    def linear(path: str, x: Tensor) -> Tensor:
        rows = []
        for row in x:
            y = [sum(w * v for w, v in zip(weights, row, strict=True)) for weights in state[f"{path}.weight"]]
            d, b = state[f"{path}.delta.d"], state[f"{path}.delta.b"]
            rows.append(torch.stack([(1 + d[o]) * (y[o] + b[o]) for o in range(len(y))]))
        return torch.stack(rows)

    def softmax_of(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        scores = torch.stack([(q * key).sum() for key in keys]) * config.head_dim**-0.5
        weights = (scores - scores.max()).exp()
        return sum((w / weights.sum() * value for w, value in zip(weights, values, strict=True)), torch.zeros(len(q)))

    x = torch.stack([state["tok_embeddings.weight"][one] for one in ids])
    for i in range(config.n_layers):
        layer, D = f"layers.{i}.attention", config.head_dim
        normed = torch.stack(
            [reference.rms_norm(row, state[f"layers.{i}.attention_norm.weight"], config.norm_eps) for row in x]
        )
        q, k, v = (linear(f"{layer}.{w}", normed).unflatten(1, (-1, D)) for w in ("wq", "wk", "wv"))
        prompt_k, prompt_v = (
            linear(f"{layer}.{w}", prompts.get(i, no_prompt)).unflatten(1, (-1, D)) for w in ("wk", "wv")
        )
        gate = state[f"{layer}.adaption.gate"].tanh()
        rows = []
        for t in range(len(ids)):
            heads = []
            for h in range(config.n_heads):
                g = h * config.n_kv_heads // config.n_heads
                query = reference.rope_halves(q[t, h], t, config)
                keys = torch.stack([reference.rope_halves(k[s, g], s, config) for s in range(t + 1)])
                out = softmax_of(query, keys, v[: t + 1, g])
                if i in prompts:
                    out = out + gate[h] * softmax_of(query, prompt_k[:, g], prompt_v[:, g])
                heads.append(out)
            rows.append(torch.cat(heads))
        x = x + linear(f"{layer}.wo", torch.stack(rows))
        ffn = f"layers.{i}.feed_forward"
        normed = torch.stack(
            [reference.rms_norm(row, state[f"layers.{i}.ffn_norm.weight"], config.norm_eps) for row in x]
        )
        gated = linear(f"{ffn}.w1", normed)
        x = x + linear(f"{ffn}.w2", gated / (1 + (-gated).exp()) * linear(f"{ffn}.w3", normed))
    final = torch.stack([reference.rms_norm(row, state["norm.weight"], config.norm_eps) for row in x])
    return final @ state["output.weight"].T


@torch.no_grad()
def test_an_image_enters_the_lowest_layers_as_the_equations_say() -> None:
    model, images = add(base(), METHOD), [features(2)[0], None, features(2)[1]]
    logits = model(IDS[:, :4], images=model.batch_images(images))
    text = model(IDS[:, :4])
    for row, image in enumerate(images):
        expected = naive(model, IDS[row, :4].tolist(), image)
        torch.testing.assert_close(logits[row].double(), expected, rtol=0, atol=5e-4)
        assert ((logits[row] - text[row]).abs().max() > 0.02) == (image is not None), "the image should matter"


@torch.no_grad()
def test_a_fresh_adapter_changes_no_bit_with_an_image() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = base(dtype)
        expected = model(IDS)
        add(model, METHOD, trained=False)
        assert torch.equal(model(IDS, images=model.batch_images(features(3))), expected)


class Joint(V2Config):
    """V2 with one set of parameters for both kinds of records."""

    separates_images = False


def labels() -> Tensor:
    targets = IDS.clone()
    targets[:, :3] = -100
    return targets


def gradients(model: Decoder, rows: list[int], images: dict[int, Tensor]) -> dict[str, Tensor]:
    """Gradients of the loss of some rows, with the images of these rows by their number."""
    model.zero_grad()
    of_rows = model.batch_images([images.get(row) for row in rows])
    if of_rows is None:
        of_rows = torch.zeros(0, sum(WIDTHS)), torch.zeros(0, dtype=torch.int64)
    model(IDS[rows], labels()[rows], of_rows).backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.requires_grad}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_kind_of_record_trains_its_own_parameters(dtype: torch.dtype, recompute: bool) -> None:
    """Apart or in one batch; and each gets the gradient that it has in a model where nothing is held still."""
    model, images = add(base(dtype), METHOD), {1: features(1)[0]}
    model.checkpoint_activations = recompute
    assert model.image_parameters == IMAGE_GROUP
    text, pictured, mixed = (gradients(model, rows, images) for rows in ([0, 2], [1], [0, 1, 2]))
    for name in text:
        still, live = (text, pictured) if name in IMAGE_GROUP else (pictured, text)
        assert not still[name].any(), name
        assert live[name].any(), name
        torch.testing.assert_close(mixed[name], live[name], rtol=0, atol=0)
    if dtype == torch.float32:
        joint = add(base(dtype), Joint(n_layers=1, prompt_length=5, image_layers=2, vision=VISION))
        for rows, expected in (([0, 2], text), ([1], pictured)):
            whole = gradients(joint, rows, images)
            for name in whole:
                if (name in IMAGE_GROUP) == (rows == [1]):
                    torch.testing.assert_close(expected[name], whole[name], rtol=1e-4, atol=1e-5)


def test_rows_of_both_kinds_without_labels_are_refused_in_training() -> None:
    model = add(base(), METHOD)
    with pytest.raises(AdapterError, match=r"1 of 3 rows have an image, .*run them apart, or give their labels"):
        model(IDS, images=model.batch_images([features(1)[0], None, None]))


def test_a_saved_adapter_and_the_engine_show_each_row_its_own_image(tmp_path: Path) -> None:
    """Beside a row of another adapter, and one without an image: each generates as it does alone, token by token."""
    model, path, images = add(base(), METHOD), tmp_path / "a.safetensors", features(2)
    extract_adapter(model).save(path)
    file = read_adapter(path)
    assert file.config == METHOD
    again = base()
    apply_adapter(again, file, encoder="encoder-1")
    shown = [images[0], None, images[1]]
    prompts: list[Any] = [IDS[row, :n].tolist() for row, n in enumerate((5, 7, 4))]
    with torch.no_grad():
        expected = []
        for prompt, image in zip(prompts, shown, strict=True):
            ids = list(prompt)
            for _ in range(5):
                ids.append(int(again(torch.tensor([ids]), images=again.batch_images([image]))[0, -1].argmax()))
            expected.append(ids[len(prompt) :])
    assert generate(again, prompts, eos_ids=(), images=shown, max_new_tokens=5, temperature=0) == expected
    plain, other = base(), tmp_path / "b.safetensors"
    extract_adapter(add(base(), V2Config(n_layers=2, prompt_length=3))).save(other)
    store = AdapterStore(plain)
    store.register("a", path)
    store.register("b", other)
    engine = Engine(plain, adapters=store, slots=4, max_length=32)
    config = GenerationConfig(max_new_tokens=5, temperature=0.0)
    handles = [engine.submit(Request(prompt=prompts[0], adapter="b", config=config, stop_ids=()))]
    for prompt, image in zip(prompts, shown, strict=True):
        handles.append(engine.submit(Request(prompt=prompt, adapter="a", image=image, config=config, stop_ids=())))
    engine.run()
    assert [handle.choices[0].ids for handle in handles[1:]] == expected


def test_what_cannot_hold_or_take_it_says_so() -> None:
    model = add(base(), replace(METHOD, n_layers=0))
    with pytest.raises(AdapterError, match="cannot be merged"):
        merge_adapter(model)
    with pytest.raises(AdapterError, match="cannot hold an adapter of the method v2"):
        check_export(extract_adapter(model), "peft", model.config)
    with pytest.raises(AdapterError, match=r"lowest 2 layers .* top 2, more than the 3 .* to at most 1"):
        base().add_adapter(replace(METHOD, n_layers=2))
    with pytest.raises(AdapterError, match="image_layers >= 1"):
        replace(METHOD, image_layers=0)
