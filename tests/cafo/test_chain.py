"""The library's parts in a row on images: data set → choice → views → keys → training → search → file → test."""

import json
from dataclasses import replace

import torch

from cafo import fewshot
from cafo.cache import Cache, load_cache, mean_key, save_cache
from cafo.encoders import EncoderSpec, load_encoder
from cafo.held_out import on_validation
from cafo.images import load_image
from cafo.key_training import KeyTraining, train_keys
from cafo.paper_datasets import load_dataset
from cafo.prompt import read_prompts, zero_shot_classifier
from cafo.search import search
from cafo.search_grid import BetaGrid
from tests.cafo.test_encoders import RESNET


def labels(items):
    return torch.tensor([item.label for item in items])


def test_from_images_to_a_test_accuracy(tmp_path, caltech):
    dataset = load_dataset("caltech101", caltech)
    (tmp_path / "tiny.json").write_text(json.dumps(RESNET))
    encoders = {
        "clip": load_encoder(EncoderSpec(kind="clip", weights="random:0", config=str(tmp_path / "tiny.json"))),
        "dino": load_encoder(EncoderSpec(kind="timm", name="test_resnet", weights="random:1")),
    }
    prompts = read_prompts(caltech / "caltech_prompts.json", dataset.class_names)
    prompts = {name: sentences[:2] for name, sentences in prompts.items()}
    classifier = zero_shot_classifier(encoders["clip"], prompts, dataset.class_names)
    assert classifier.truncated  # the tiny CLIP's text window is 11 tokens

    def features(items, view=None):
        images = [(item.path, load_image(dataset.image_root / item.path)) for item in items]
        out = {}
        for name, encoder in encoders.items():
            prepare = encoder.preprocess
            pixels = [prepare(i) if view is None else prepare.view(i, path, view, 0) for path, i in images]
            out[name] = encoder.encode_image(torch.stack(pixels))
        return out

    few = fewshot.choose(dataset.train, dataset.class_names, shots=2, seed=0)
    each = [features(few.items, view) for view in range(2)]
    views = {name: torch.stack([view[name] for view in each]) for name in encoders}
    val = dataset.val
    cache = Cache(
        keys={name: mean_key(v) for name, v in views.items()},
        labels=labels(few.items),
        classifier=classifier.weights,
        class_names=dataset.class_names,
        encoders={name: encoder.identity for name, encoder in encoders.items()},
    )
    val_features = features(val)
    trained, best = train_keys(cache, views, cache.labels, val_features, labels(val), KeyTraining(epochs=3, batch=16))
    result = search(on_validation(trained, val_features, labels(val)), grid=BetaGrid(steps=20))
    chosen = replace(trained, alpha=result.alpha, beta=result.beta, ensemble=result.ensemble)
    right = int((chosen.logits(val_features).argmax(1) == labels(val)).sum())
    assert right == result.correct  # search and prediction are one formula
    assert result.accuracy >= best.accuracy
    save_cache(chosen, tmp_path / "cache.safetensors")
    test = dataset.open_test()
    test_features = features(test)
    assert torch.equal(load_cache(tmp_path / "cache.safetensors").logits(test_features), chosen.logits(test_features))
