"""A packed batch has the loss and the gradients of the same batch padded, and computes no token twice."""

import pytest
import torch
import torch.nn.functional as F

from adapter.adaption import AdaptionConfig
from adapter.decoder import Decoder
from adapter.decoder_config import DecoderConfig
from adapter.image_projection import ImageProjectionConfig
from adapter.loss import IGNORE
from adapter.methods.lora import LoraConfig
from adapter.packing import pack
from tests.adapter.models import GQA

B, T, V = 6, 19, GQA["vocab_size"]


def batch():
    """Rows that begin alike in several ways; of two equal ones the first has labels up to 15 alone; one has none."""
    tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
    tokens[1, :9], tokens[4, :12], tokens[5] = tokens[0, :9], tokens[0, :12], tokens[2]
    labels = tokens.clone()
    labels[:, :8], labels[2, 15:], labels[1, 12], labels[4] = IGNORE, IGNORE, IGNORE, IGNORE
    return tokens, labels


def random_decoder(adapter, **changes):
    torch.manual_seed(1)
    model = Decoder(DecoderConfig(**{**GQA, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if adapter is not None:
        model.add_adapter(adapter)
        for _, parameter in model.adapter_parameters():
            torch.nn.init.normal_(parameter)
    return model.double() if model.vision is None else model


def padded_losses(model, tokens, labels, images=None):
    """Each row's loss from the logits of all its positions."""
    logits = model(tokens, images=images)[:, :-1].transpose(1, 2)
    return F.cross_entropy(logits, labels[:, 1:], ignore_index=IGNORE, reduction="none").sum(1)


ADAPTERS = {
    "no adapter": None,
    "prompts": AdaptionConfig(n_layers=2, prompt_length=5),
    "prefix": AdaptionConfig(n_layers=2, prompt_length=5, gate="prefix"),
    "lora": LoraConfig(rank=3),
}


@pytest.mark.parametrize(
    "changes", [{}, {"sliding_window": 7, "sliding_layers": frozenset({0, 2})}], ids=["full", "window"]
)
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_loss_and_gradients_are_those_of_the_padded_batch(adapter, changes):
    model, (tokens, labels) = random_decoder(adapter, **changes), batch()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours, theirs = model(tokens, labels), padded_losses(model, tokens, labels)
    torch.testing.assert_close(ours.double(), theirs.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(model.losses(tokens, labels).double(), theirs, rtol=1e-6, atol=0)
    actual, expected = (torch.autograd.grad(loss, trained) for loss in (ours, theirs.sum()))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_a_packed_record_has_the_loss_that_it_has_alone(adapter):
    model = random_decoder(adapter)
    lengths = [5, 19, 11, 2, 13, 7]
    (tokens, labels), alone = batch(), []
    labels[:, 1] = tokens[:, 1]  # every record has a label, the shortest one alone
    for row, length in enumerate(lengths):
        tokens[row, length:], labels[row, length:] = 0, IGNORE
        logits = model(tokens[row : row + 1, :length])[0, :-1]
        alone.append(F.cross_entropy(logits, labels[row, 1:length], ignore_index=IGNORE, reduction="sum"))
    assert len(pack(tokens, labels).tokens) < sum(lengths)
    torch.testing.assert_close(model.losses(tokens, labels).double(), torch.stack(alone), rtol=1e-6, atol=0)


def test_each_label_is_predicted_by_its_own_token_whatever_the_order_of_rows_and_labels():
    """Rows of few different tokens begin alike often; a label may stand where a longer row before it has none."""
    model, draw = random_decoder(None), torch.Generator().manual_seed(3)
    for _ in range(60):
        tokens = torch.randint(2, (4, 7), generator=draw)
        labels = torch.where(torch.rand(4, 7, generator=draw) < 0.3, tokens, IGNORE)
        expected = padded_losses(model, tokens, labels)
        torch.testing.assert_close(model.losses(tokens, labels).double(), expected, rtol=1e-6, atol=1e-12)


def test_rows_with_images_share_nothing():
    vision = ImageProjectionConfig(widths=(5,), bottleneck=3)
    model = random_decoder(AdaptionConfig(n_layers=2, prompt_length=5, vision=vision))
    tokens, labels = batch()
    tokens[3:] = tokens[0]
    images = torch.randn(3, 5, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 3, 5])
    ours, theirs = model.losses(tokens, labels, images), padded_losses(model, tokens, labels, images)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    actual, expected = (torch.autograd.grad(loss.sum(), trained) for loss in (ours, theirs))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_every_distinct_prefix_before_a_last_label_is_computed_once():
    tokens, labels = batch()
    packing = pack(tokens, labels)
    prefixes = set()
    for row, targets in zip(tokens.tolist(), labels.tolist(), strict=True):
        last = max((place for place, label in enumerate(targets) if label != IGNORE), default=0)
        prefixes |= {tuple(row[: end + 1]) for end in range(last)}
    assert len(packing.tokens) == len(prefixes)
    assert len(packing.targets) == (labels[:, 1:] != IGNORE).sum()


def test_without_a_label_one_token_is_computed_and_every_gradient_is_zero():
    model, (tokens, labels) = random_decoder(ADAPTERS["prompts"]), batch()
    packing = pack(tokens, torch.full_like(labels, IGNORE))
    assert (len(packing.tokens), len(packing.targets)) == (1, 0)
    assert len(pack(tokens[:1], torch.full_like(labels[:1], IGNORE)).tokens) == 1
    loss = model(tokens, torch.full_like(labels, IGNORE))
    assert loss.item() == 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(grad.count_nonzero() == 0 for grad in torch.autograd.grad(loss, trained))


def test_activations_computed_again_give_the_same_gradients():
    model, (tokens, labels) = random_decoder(ADAPTERS["prompts"]), batch()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(model(tokens, labels), trained)
    model.checkpoint_activations = True
    torch.testing.assert_close(torch.autograd.grad(model(tokens, labels), trained), expected, rtol=0, atol=0)
