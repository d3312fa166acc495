"""Images in prompts: what the equations say, nothing where there is none, and no gradient where none belongs."""

import json
from dataclasses import replace

import pytest
import torch

from adapter.adapter_file import apply_adapter, extract_adapter
from adapter.adapter_formats import read_adapter
from adapter.adaption import AdaptionConfig
from adapter.base.tensor_files import read_metadata
from adapter.decoder import Decoder
from adapter.decoder_config import DecoderConfig
from adapter.errors import CheckpointError
from adapter.generate import generate
from adapter.image_projection import ImageProjectionConfig
from tests.adapter import reference
from tests.adapter.models import GQA, MHA, llama, tokens

WIDTHS = (5, 11, 3)
VISION = ImageProjectionConfig(widths=WIDTHS, bottleneck=13, encoder="encoder-1", preprocess="32 pixels")
shapes = pytest.mark.parametrize("shape", [MHA, GQA], ids=["mha", "gqa"])


def config(**changes) -> AdaptionConfig:
    return AdaptionConfig(**{"n_layers": 3, "prompt_length": 7, "vision": VISION, **changes})


def features(count, seed=0):
    return list(torch.randn(count, sum(WIDTHS), generator=torch.Generator().manual_seed(seed)) * 9 + 2)


@shapes
@pytest.mark.parametrize("gate", ["tanh", "identity", "one", "prefix"])
@torch.no_grad()
def test_each_row_sees_its_own_image_as_the_equations_say(shape, gate):
    adaption = config(n_layers=1, gate=gate)
    model, ids = llama({**shape, "n_layers": 2}, adaption), tokens(3, 5)
    one, two = features(2)
    logits = model(ids, images=model.batch_images([one, None, two]))
    text_only = model(ids)
    for row, image in enumerate([one, None, two]):
        state = model.state_dict()
        if image is not None:
            state["layers.1.attention.adaption.prompt"] = (
                state["layers.1.attention.adaption.prompt"] + reference.image_token(image, state, WIDTHS).float()
            )
        expected = reference.decoder(state, model.config, ids[row].tolist(), adaption)
        torch.testing.assert_close(logits[row].double(), expected, rtol=0, atol=2e-4)
        assert ((logits[row] - text_only[row]).abs().max() > 0.05) == (image is not None), "the image should matter"


@shapes
@torch.no_grad()
def test_a_row_without_an_image_is_the_text_only_adapter_to_the_bit(shape):
    model, ids = llama(shape, config()), tokens(3, 17)
    mixed = model(ids, images=model.batch_images([features(1)[0], None, None]))
    assert torch.equal(mixed[1:], model(ids)[1:])
    assert torch.equal(model(ids, images=(torch.zeros(0, sum(WIDTHS)), torch.zeros(0, dtype=torch.long))), model(ids))
    assert model.batch_images([None, None, None]) is None


@torch.no_grad()
def test_a_fresh_adapter_with_images_changes_no_bit():
    model, ids = llama(GQA), tokens(2, 17)
    base = model(ids)
    model.add_adapter(config(), torch.Generator().manual_seed(1))
    assert torch.equal(model(ids, images=model.batch_images(features(2))), base)


@shapes
def test_three_steps_reach_prompts_gates_and_projection_and_nothing_else(shape):
    model = llama(shape)
    model.add_adapter(config(), torch.Generator().manual_seed(1))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(3):
        ids = tokens(3, 13, seed=step)
        optimizer.zero_grad()
        model(ids, ids, model.batch_images([*features(2, seed=step), None])).backward()
        optimizer.step()
    ours = {name for name, _ in model.adapter_parameters()}
    assert {name for name in ours if "adaption" not in name} == {
        f"vision.{linear}.{tensor}" for linear in ("down", "up") for tensor in ("weight", "bias")
    }
    for name, parameter in model.named_parameters():
        if name in ours:
            assert (parameter != before[name]).all(), name
        else:
            assert parameter.grad is None, name
            assert torch.equal(parameter, before[name]), name


def test_a_batch_without_images_still_gives_the_projection_a_gradient_of_zero():
    """Workers whose batches differ must agree on which parameters have gradients, or their reductions do not meet."""
    model, ids = llama(MHA, config()), tokens(2, 13)
    model(ids, ids, (torch.zeros(0, sum(WIDTHS)), torch.zeros(0, dtype=torch.long))).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert all(not parameter.grad.any() for parameter in model.vision.parameters())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_recomputed_layers_give_the_same_gradients(checkpointed):
    model, ids = llama(GQA, config()), tokens(2, 13)
    model.checkpoint_activations = checkpointed
    model(ids, ids, model.batch_images([None, features(1)[0]])).backward()
    grad = model.vision.down.weight.grad
    model.zero_grad()
    model.checkpoint_activations = False
    model(ids, ids, model.batch_images([None, features(1)[0]])).backward()
    torch.testing.assert_close(grad, model.vision.down.weight.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("widths", [(1024,) * 4, (768,) * 4, (256, 512, 1024, 2048, 1024)], ids=["L14", "B16", "RN50"])
def test_the_7b_adapter_with_images_has_1_8_million_parameters(widths):
    with torch.device("meta"):
        model = Decoder(
            DecoderConfig(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, hidden_dim=11008, vocab_size=32_000)
        )
        model.add_adapter(AdaptionConfig(vision=ImageProjectionConfig(widths=widths)))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    F = sum(widths)
    assert trainable == 1_229_760 + 72 * (F + 1) + 4096 * (72 + 1)
    assert trainable == {4096: 1_823_752, 3072: 1_750_024, 4864: 1_879_048}[F]


@pytest.mark.parametrize("gate", ["tanh", "prefix"])
def test_generation_keeps_every_rows_image(gate):
    """Rows of different lengths, one without an image, one that leaves the batch early: each as if alone."""
    model = llama(GQA, config(gate=gate))
    prompts, images = [[1, 5, 9, 2], [1, 7], [1, 3, 8]], [features(2)[0], None, features(2)[1]]
    alone = [
        generate(model, [prompt], eos_ids=(), images=[image], max_new_tokens=9, temperature=0)[0]
        for prompt, image in zip(prompts, images, strict=True)
    ]
    eos = alone[0][2]
    expected = [row[: row.index(eos)] if eos in row else row for row in alone]
    assert generate(model, prompts, eos_ids={eos}, images=images, max_new_tokens=9, temperature=0) == expected
    longer = [*prompts[2]]
    for token in alone[2]:
        with torch.no_grad():
            assert model(torch.tensor([longer]), images=model.batch_images(images[2:]))[0, -1].argmax() == token
        longer.append(token)
    assert alone != [generate(model, [p], eos_ids=(), max_new_tokens=9, temperature=0)[0] for p in prompts]


def test_images_that_cannot_be_read_are_refused():
    model = llama(MHA, config())
    with pytest.raises(ValueError, match=r"reads 19 features of an image, got \(20,\)"):
        model.batch_images([torch.zeros(20)])
    with pytest.raises(ValueError, match="text alone"):
        llama(MHA, config(vision=None)).batch_images([torch.zeros(19)])
    with pytest.raises(ValueError, match="bottleneck"):
        ImageProjectionConfig(widths=())


@pytest.mark.parametrize("gate", ["tanh", "one", "prefix"])
def test_a_file_holds_projection_encoder_and_preprocessing(tmp_path, gate):
    model, ids = llama(MHA, config(gate=gate)), tokens(2, 11)
    path = tmp_path / "a.safetensors"
    file = extract_adapter(model)
    file.save(path)
    again = read_adapter(path)
    assert json.loads(read_metadata(path)["vision"])["tower"] == "encoder-1", "files keep their spelling"
    assert again.config == config(gate=gate)
    assert (again.vision.encoder, again.vision.preprocess) == ("encoder-1", "32 pixels")
    assert again.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    fresh = llama(MHA, config(gate=gate))
    fresh.add_adapter(AdaptionConfig(n_layers=1))
    apply_adapter(fresh, again, encoder="encoder-1")
    with torch.no_grad():
        assert torch.equal(
            fresh(ids, images=fresh.batch_images(features(2))), model(ids, images=model.batch_images(features(2)))
        )
    with pytest.raises(CheckpointError, match=r"another image encoder.*encoder-1, here encoder-2"):
        apply_adapter(fresh, again, encoder="encoder-2")
    prompts = {name: again.tensors[name] for name in ("prompt", "gate")}
    text = replace(again, config=config(gate=gate, vision=None), tensors=prompts)
    with pytest.raises(CheckpointError, match="text alone"):
        apply_adapter(fresh, text, encoder="encoder-1")


def test_damaged_projections_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    file = extract_adapter(llama(MHA, config()))
    wider = config(vision=replace(VISION, bottleneck=17))
    for changes, message in [
        ({"tensors": {name: file.tensors[name] for name in ("prompt", "gate")}}, "expected the tensors .*vision.up"),
        ({"tensors": {**file.tensors, "vision.up.bias": torch.zeros(3)}}, r"vision.up.bias has shape \(3,\)"),
        ({"config": wider}, "vision.down.bias has shape|vision.down.weight has"),
        ({"tensors": {**file.tensors, "vision.up.bias": torch.full((42,), torch.nan)}}, "not finite"),
    ]:
        replace(file, **changes).save(path)
        with pytest.raises(CheckpointError, match=message):
            read_adapter(path)
