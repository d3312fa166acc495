"""The core on a GPU equals the core on a CPU."""

import pytest
import torch

from adapter.adaption import AdaptionConfig
from adapter.batching import collate
from adapter.decoder import Decoder, RMSNorm
from adapter.decoder_config import DecoderConfig
from adapter.generate import generate
from cafo.cache import Cache
from cafo.encoder_spec import EncoderSpec
from cafo.encoders import load_encoder
from cafo.held_out import on_validation
from cafo.search import search

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPE = DecoderConfig(dim=24, n_layers=3, n_heads=6, n_kv_heads=3, hidden_dim=41, vocab_size=97)


def make_decoder(device: str) -> Decoder:
    """The same random decoder with an adapter, on a device."""
    torch.manual_seed(0)
    model = Decoder(SHAPE)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.reset_parameters()
    model.add_adapter(AdaptionConfig(n_layers=2, prompt_length=5), torch.Generator().manual_seed(0))
    for adaption in model.adaptions:
        torch.nn.init.constant_(adaption.gate, 0.3)
    return model.to(device)


def test_losses_and_gradients() -> None:
    rng = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 97, (n,), generator=rng).tolist() for n in (7, 13, 11)]
    tokens, labels = collate(rows, [[(3, len(row))] for row in rows])
    found = {}
    for device in ("cpu", "cuda"):
        model = make_decoder(device)
        loss = model(tokens.to(device), labels.to(device))
        loss.backward()
        gradients = [p.grad.cpu() for _, p in model.adapter_parameters() if p.grad is not None]
        found[device] = [loss.detach().cpu(), *gradients]
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-3, atol=1e-4)


def test_greedy_tokens() -> None:
    prompts = [[3, 5, 7], [11, 13, 17, 19, 23]]
    answers = [
        generate(make_decoder(device), prompts, eos_ids=(), temperature=0, max_new_tokens=9)
        for device in ("cpu", "cuda")
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_features(name: str) -> None:
    spec = EncoderSpec(kind="timm", name=name, weights="random:0")
    encoders = [load_encoder(spec, device) for device in ("cpu", "cuda")]
    side = encoders[0].preprocess.size
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    on_cpu, on_gpu = (encoder.encode_image(images).cpu() for encoder in encoders)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-4)


def test_choice() -> None:
    rng = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize
    keys, features, classifier = (unit(torch.randn(n, 17, generator=rng), dim=1) for n in (15, 60, 5))
    labels = torch.randint(5, (60,), generator=rng)
    found = []
    for device in ("cpu", "cuda"):
        cache = Cache(
            keys={"clip": keys.to(device)},
            labels=torch.arange(5).repeat_interleave(3).to(device),
            classifier=classifier.T.to(device),
            class_names=tuple("abcde"),
        )
        images = on_validation(cache, {"clip": features.to(device)}, labels.to(device))
        result = search(images)
        found.append((result.correct, result.zero_shot_correct, result.total))
    assert found[0] == found[1]
