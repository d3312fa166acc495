import argparse
import dataclasses
import json
import pickle
import shutil

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from cafo.encoders import EncoderSpec, ImageEncoder, load_encoder
from cafo.errors import EncoderError
from cafo.images import CLIP_MEAN, IMAGENET_MEAN, Preprocess

VIT = {
    "embed_dim": 13,
    "vision_cfg": {"image_size": 32, "layers": 5, "width": 34, "head_width": 17, "patch_size": 8},
    "text_cfg": {"context_length": 11, "vocab_size": 49408, "width": 14, "heads": 2, "layers": 1},
    "quick_gelu": True,
}
RESNET = VIT | {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}, "quick_gelu": False}
SENTENCES = ["a photo of a bonsai.", "a small tree, " * 9]


def tiny(config, seed=0):
    torch.manual_seed(seed)
    return open_clip.CLIP(**json.loads(json.dumps(config))).eval()


def folder(tmp_path, config=VIT, model=None, **json_extra):
    save_file(
        {n: t.contiguous() for n, t in (model or tiny(config)).state_dict().items()},
        tmp_path / "open_clip_model.safetensors",
    )
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, **json_extra}))
    return tmp_path


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_clip_equals_open_clips_own_model(tmp_path, config):
    model = tiny(config)
    encoder = load_encoder(EncoderSpec(kind="clip", weights=str(folder(tmp_path, config, model))))
    batch = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_image(batch), model.encode_image(batch, normalize=True))
        tokens = open_clip.SimpleTokenizer(context_length=11)(SENTENCES)
        torch.testing.assert_close(encoder.encode_text(SENTENCES), model.encode_text(tokens, normalize=True))
    assert encoder.width == 13
    assert [encoder.is_truncated(s) for s in SENTENCES] == [False, True]
    assert encoder.preprocess == Preprocess(size=32, resize=32, mean=CLIP_MEAN)
    assert not any(p.requires_grad for p in encoder.model.parameters())


def test_the_class_token_after_evenly_spaced_blocks(tmp_path):
    encoder = load_encoder(EncoderSpec(kind="clip", weights=str(folder(tmp_path))))
    outputs = []
    hooks = [
        block.register_forward_hook(lambda m, i, o: outputs.append(o))
        for block in encoder.model.visual.transformer.resblocks
    ]
    got = encoder.multi_scale(torch.randn(3, 3, 32, 32), blocks=3)
    for hook in hooks:
        hook.remove()
    assert [tuple(f.shape) for f in got] == [(3, 34)] * 3
    for feature, block in zip(got, (1, 2, 4), strict=True):
        torch.testing.assert_close(feature, outputs[block][:, 0])
    with pytest.raises(ValueError, match="6 blocks"):
        encoder.multi_scale(torch.randn(1, 3, 32, 32), blocks=6)


def test_pooled_stages_of_a_resnet(tmp_path):
    model = tiny(RESNET)
    encoder = load_encoder(EncoderSpec(kind="clip", weights=str(folder(tmp_path, RESNET, model))))
    batch = torch.randn(3, 3, 32, 32)
    got = encoder.multi_scale(batch)
    assert [f.shape[1] for f in got] == [32, 64, 128, 256, 13]
    with torch.no_grad():
        x = model.visual.stem(batch)
        for feature, layer in zip(got, ("layer1", "layer2", "layer3", "layer4"), strict=False):
            x = getattr(model.visual, layer)(x)
            torch.testing.assert_close(feature, x.mean(dim=(2, 3)))
    torch.testing.assert_close(F.normalize(got[-1], dim=1), encoder.encode_image(batch))


def test_an_encoder_stays_frozen_while_others_train(tmp_path):
    """Not even the running means of its batch norms move, to the bit."""
    encoder = load_encoder(EncoderSpec(kind="clip", weights=str(folder(tmp_path, RESNET))))
    before = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    batch = torch.randn(3, 3, 32, 32)
    head = torch.nn.Linear(sum(f.shape[1] for f in encoder.multi_scale(batch)), 2)
    optimizer = torch.optim.AdamW([*head.parameters(), *encoder.model.parameters()], lr=0.1, weight_decay=0.1)
    head(torch.cat(encoder.multi_scale(batch), dim=1)).square().sum().backward()
    optimizer.step()
    assert before.keys() == encoder.model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.model.state_dict().items())


def test_identity_is_weights_preprocessing_and_precision(tmp_path):
    for name in ("a", "b", "c", "d", "heads", "gelu"):
        (tmp_path / name).mkdir()
    folder(tmp_path / "a")
    torch.save({"state_dict": {f"module.{n}": t for n, t in tiny(VIT).state_dict().items()}}, tmp_path / "b" / "w.pt")
    (tmp_path / "b" / "w.json").write_text(json.dumps(VIT))
    folder(tmp_path / "c", model=tiny(VIT, seed=1))
    folder(tmp_path / "d", preprocess_cfg={"mean": [0.5, 0.5, 0.5]})

    folder(tmp_path / "heads", {**VIT, "vision_cfg": {**VIT["vision_cfg"], "head_width": 34}}, model=tiny(VIT))
    folder(tmp_path / "gelu", {**VIT, "quick_gelu": False}, model=tiny(VIT))

    def identity(where, **kwargs):
        return load_encoder(EncoderSpec(kind="clip", weights=str(tmp_path / where), **kwargs)).identity

    one = identity("a")
    assert identity("b/w.pt") == identity("a", name="tiny") == one, "a folder's name is no part of it"
    others = [identity("a", precision="bf16"), *map(identity, ("c", "d", "heads", "gelu"))]
    assert len({one, *others}) == 6


def test_bf16_stays_near_fp32_and_returns_float32(tmp_path):
    folder(tmp_path)
    full, half = (load_encoder(EncoderSpec(kind="clip", weights=str(tmp_path), precision=p)) for p in ("fp32", "bf16"))
    batch = torch.randn(3, 3, 32, 32)
    assert half.encode_image(batch).dtype == half.encode_text(SENTENCES).dtype == torch.float32
    assert F.cosine_similarity(full.encode_image(batch), half.encode_image(batch)).min() > 0.99


def test_weights_must_fit_to_the_last_key(tmp_path):
    model = tiny(VIT)
    state = {n: t.contiguous() for n, t in model.state_dict().items()}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(VIT))
    for name, broken, message in [
        ("missing", {n: t for n, t in state.items() if n != "logit_scale"}, "1 missing: logit_scale"),
        ("extra", state | {"surplus": torch.zeros(1)}, "not expected: surplus"),
        ("shape", state | {"visual.proj": torch.zeros(2, 2)}, "shape: visual.proj"),
    ]:
        save_file(broken, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=message):
            load_encoder(EncoderSpec(kind="clip", weights=str(tmp_path / f"{name}.safetensors")))


class Dangerous:
    def __reduce__(self):
        return (pytest.fail, ("a weight file ran code",))


def test_weight_files_never_run_code(tmp_path):
    torch.save({"state_dict": Dangerous()}, tmp_path / "a.pt")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Dangerous(), protocol=2))
    for path in ("a.pt", "b.pth"):
        with pytest.raises(ValueError, match="plain tensors"):
            load_encoder(EncoderSpec(kind="timm", name="resnet10t", weights=str(tmp_path / path)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_a_torchscript_archive_is_refused_with_a_hint(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 3)).save(tmp_path / "RN50.pt")
    with pytest.raises(ValueError, match="TorchScript"):
        load_encoder(EncoderSpec(kind="clip", name="RN50-quickgelu", weights=str(tmp_path / "RN50.pt")))


def activation(name, path, **kwargs):
    """The error of loading an almost empty file: about the activation, or, once that is settled, about the keys."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the caller looks at the message
        load_encoder(EncoderSpec(kind="clip", name=name, weights=str(path), **kwargs))
    return str(error.value)


def test_the_activation_must_match_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "cafo.encoder_weights._assemble", lambda *a, **k: (_ for _ in ()).throw(ValueError("assembled"))
    )
    plain, openai = tmp_path / "plain.pt", tmp_path / "openai.pt"
    torch.save({"w": torch.zeros(1)}, plain)
    scalars = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save({"w": torch.zeros(1)} | scalars, openai)
    # nothing speaks for the weights
    assert "does not tell" in activation("ViT-B-32", plain)
    assert activation("ViT-B/32-quickgelu", plain) == "assembled"
    assert activation("ViT-B-32", plain, quick_gelu=False) == "assembled"
    assert "use ViT-B-32-quickgelu" in activation("ViT-B-32", plain, quick_gelu=True)
    assert activation("convnext_base", plain) == "assembled"
    # OpenAI's own archives do
    assert "use RN50-quickgelu" in activation("RN50", openai)
    assert "is stated" in activation("RN50-quickgelu", openai, quick_gelu=False)
    assert activation("RN50-quickgelu", openai) == "assembled"
    # a published file is known by its digest
    monkeypatch.setattr("cafo.encoder_weights._published_entry", lambda path: {"quick_gelu": False})
    assert "use ViT-B-32" in activation("ViT-B-32-quickgelu", plain)
    assert activation("ViT-B-32", plain) == "assembled"
    # a tag is known by open_clip's table
    monkeypatch.setattr(open_clip, "download_pretrained", lambda entry: str(plain))
    assert "use RN50-quickgelu" in activation("RN50", "openai")
    assert activation("RN50-quickgelu", "openai") == "assembled"
    assert "nor a tag" in activation("ViT-B-32-quickgelu", "laion2b_s34b_b79k")


def test_published_files_are_recognised_by_digest(tmp_path, monkeypatch):
    import hashlib

    from cafo.encoder_weights import _published_entry

    (tmp_path / "w.pt").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    entry = {"url": f"https://example.org/models/{digest}/RN50.pt", "quick_gelu": True}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: entry)
    assert _published_entry(tmp_path / "w.pt") == entry
    (tmp_path / "w.pt").write_bytes(b"other")
    assert _published_entry(tmp_path / "w.pt") == {}


def test_unknown_names_and_files_say_so(tmp_path):
    for spec, message in [
        (EncoderSpec(kind="clip", name="RN5000", weights="openai"), "RN5000"),
        (EncoderSpec(kind="clip", name="RN50-quickgelu", weights="nosuchtag"), "its tags: openai"),
        (EncoderSpec(kind="timm", name="nosuchnet", weights="x"), "nosuchnet"),
        (EncoderSpec(kind="timm", name="resnet50.nosuchtag", weights="random:0"), "timm cannot build .*nosuchtag"),
        (EncoderSpec(kind="dino", weights=str(tmp_path / "none.pth")), "none.pth"),
        (EncoderSpec(kind="clip", weights=str(tmp_path)), "found none"),
        (EncoderSpec(kind="mae", weights="x"), "mae"),
        (EncoderSpec(kind="clip", name="RN50"), "needs weights"),
        (EncoderSpec(kind="pixels", name="0"), "has its side for a name"),
        (EncoderSpec(kind="timm", name="resnet10t", weights="random:0", precision="fp8"), "fp8"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_encoder(spec)


def test_random_encoders_are_reproducible_and_leave_the_rng_alone():
    state = torch.random.get_rng_state()
    one, same, other = (
        load_encoder(EncoderSpec(kind="timm", name="test_resnet", weights=f"random:{seed}")) for seed in (3, 3, 4)
    )
    assert one.identity == same.identity != other.identity
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("wrapper", ["official", "teacher", "module"])
def test_dino_resnet50_from_its_checkpoints(tmp_path, wrapper):
    torch.manual_seed(0)
    reference = timm.create_model("resnet50", pretrained=False, num_classes=0).eval()
    state = reference.state_dict()
    if wrapper == "teacher":
        heads = {"head.mlp.0.weight": torch.zeros(2), "head.last_layer.weight_g": torch.zeros(2)}
        content = {"student": {}, "teacher": {f"backbone.{n}": t for n, t in state.items()} | heads, "epoch": 7}
    elif wrapper == "module":
        content = {"state_dict": {f"module.backbone.{n}": t for n, t in state.items()} | {"fc.weight": torch.zeros(2)}}
    else:
        content = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    torch.save(content, tmp_path / "dino.pth")
    encoder = load_encoder(EncoderSpec(kind="dino", weights=str(tmp_path / "dino.pth")))
    assert (encoder.width, encoder.preprocess.mean, encoder.preprocess.resize) == (2048, IMAGENET_MEAN, 256)
    batch = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_image(batch), F.normalize(reference(batch), dim=1))
    if wrapper == "official":
        assert [f.shape[1] for f in encoder.multi_scale(batch)] == [256, 512, 1024, 2048, 2048]


def test_a_timm_vit(tmp_path):
    torch.manual_seed(0)
    reference = timm.create_model("test_vit", pretrained=False, num_classes=0).eval()
    save_file(reference.state_dict() | {"head.weight": torch.zeros(3)}, tmp_path / "vit.safetensors")
    encoder = load_encoder(EncoderSpec(kind="timm", name="test_vit", weights=str(tmp_path / "vit.safetensors")))
    side = encoder.preprocess.size
    batch = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_image(batch), F.normalize(reference(batch), dim=1))
    assert len(encoder.multi_scale(batch, blocks=2)) == 2
    assert encoder.preprocess.mean != CLIP_MEAN


def test_a_folder_in_timms_format_brings_architecture_preprocessing_and_unpooled_maps(tmp_path):
    torch.manual_seed(0)
    shape = {"channels": [8, 16, 16, 24], "stem_width": 8, "output_stride": 16, "global_pool": ""}
    reference = timm.create_model("resnet10t", num_classes=0, **shape).eval()
    data = {"input_size": (3, 48, 48), "crop_pct": 0.75, "mean": (0.1, 0.2, 0.3)}
    timm.models.save_for_hf(reference, tmp_path / "tiny", safe_serialization="both", data_config=data)
    encoder = load_encoder(EncoderSpec(kind="timm", weights=str(tmp_path / "tiny")))
    assert (encoder.name, encoder.width) == ("timm-resnet10t", 24 * 3 * 3)
    assert (encoder.preprocess.size, encoder.preprocess.resize, encoder.preprocess.mean) == (48, 64, (0.1, 0.2, 0.3))
    batch = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_image(batch), F.normalize(reference(batch).flatten(1), dim=1))
    assert [f.shape[1] for f in encoder.multi_scale(batch)] == [8, 16, 16, 24, 24 * 3 * 3]
    untrained = load_encoder(EncoderSpec(kind="timm", name=str(tmp_path / "tiny"), weights="random:3"))
    assert (untrained.width, untrained.preprocess) == (encoder.width, encoder.preprocess)
    assert untrained.identity != encoder.identity
    shutil.copytree(tmp_path / "tiny", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert load_encoder(EncoderSpec(kind="timm", weights=str(tmp_path / "other"))).identity == encoder.identity
    config["model_args"] |= {"output_stride": 32}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    assert load_encoder(EncoderSpec(kind="timm", weights=str(tmp_path / "other"))).identity != encoder.identity
    (tmp_path / "tiny" / "config.json").write_text('{"architecture": "nosuchnet"}')
    with pytest.raises(ValueError, match="nosuchnet"):
        load_encoder(EncoderSpec(kind="timm", weights=str(tmp_path / "tiny")))


HUGE = 10**9


@pytest.mark.parametrize("weights", ["their own", "random:0"])
@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("vision_cfg", {"layers": HUGE}),
        ("vision_cfg", {"layers": [1, 1, HUGE, 1]}),
        ("vision_cfg", {"width": 34 * HUGE}),
        ("vision_cfg", {"image_size": HUGE}),
        ("text_cfg", {"layers": HUGE}),
        ("text_cfg", {"context_length": HUGE}),
    ],
    ids=str,
)
def test_a_clip_json_that_asks_for_a_giant_is_refused_before_it_is_built(tmp_path, part, values, weights):
    folder(tmp_path)
    given = tmp_path / "given.json"
    given.write_text(json.dumps({**VIT, part: {**VIT[part], **values}}))
    spec = EncoderSpec(kind="clip", name="tiny", weights=str(tmp_path) if weights != "random:0" else weights)
    message = "over 20,000 tensors" if weights == "random:0" else "a far larger encoder than its weights: .* holds"
    with pytest.raises(EncoderError, match=rf"given\.json describes .*{message}"):
        load_encoder(dataclasses.replace(spec, config=str(given)))


@pytest.mark.parametrize("weights", ["their own", "random:0"])
@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("test_vit", {"depth": HUGE}, "larger encoder|20,000 tensors"),
        ("test_vit", {"embed_dim": 64 * HUGE}, "larger encoder|20,000 tensors"),
        ("resnet10t", {"layers": [1, HUGE, 1, 1]}, "larger encoder|20,000 tensors"),
        ("resnet10t", {"layers": 0}, "describes no encoder that timm can build"),
        ("resnet10t", {"input_size": [3, HUGE, HUGE]}, "images of side 1000000000; it should be 1 to 4096 pixels"),
        ("resnet10t", {"crop_pct": "wide"}, "describes no encoder that timm can build"),
    ],
    ids=str,
)
def test_a_timm_config_that_asks_for_a_giant_or_for_nonsense_is_refused(tmp_path, name, values, message, weights):
    timm.models.save_for_hf(timm.create_model(name, num_classes=0), tmp_path, safe_serialization="both")
    config = json.loads((tmp_path / "config.json").read_text())
    part = "pretrained_cfg" if name == "resnet10t" and "layers" not in values else "model_args"
    changed = {**config, part: {**config.get(part, {}), **values}}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    given = str(tmp_path) if weights != "random:0" else weights
    with pytest.raises(EncoderError, match=rf"config\.json .*({message})"):
        load_encoder(EncoderSpec(kind="timm", name=str(tmp_path), weights=given))


def test_pixels_are_the_image_itself():
    encoder = load_encoder(EncoderSpec(kind="pixels", name="5"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8))
    with pytest.raises(EncoderError, match="images of side 50000"):
        load_encoder(EncoderSpec(kind="pixels", name="50000"))
    flat = torch.from_numpy(np.array(image)).permute(2, 0, 1).flatten().float()
    torch.testing.assert_close(encoder.encode_image(encoder.preprocess(image)[None])[0], F.normalize(flat, dim=0))


def test_a_custom_network_and_features_that_are_not_finite():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 5 * 5, 7))
    encoder = ImageEncoder(network, name="own", preprocess=Preprocess(size=5, resize=5))
    assert encoder.width == 7
    batch = torch.randn(3, 3, 5, 5)
    assert encoder.encode_image(batch).norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    batch[1] = float("nan")
    with pytest.raises(ValueError, match=r"\[1\]"):
        encoder.encode_image(batch)
    with pytest.raises(ValueError, match="forward_intermediates"):
        encoder.multi_scale(batch)


@pytest.mark.parametrize("kind", ["safetensors", "pth", "timm"])
def test_weights_that_are_no_numbers_are_named_at_load(tmp_path, kind):
    if kind == "timm":
        state = timm.create_model("test_resnet", pretrained=False, num_classes=0).state_dict()
        spec = EncoderSpec(kind="timm", name="test_resnet", weights=str(tmp_path / "x.pth"))
    else:
        state = tiny(VIT).state_dict()
        spec = EncoderSpec(kind="clip", weights=str(tmp_path / f"x.{kind}"), config=str(tmp_path / "model.json"))
        (tmp_path / "model.json").write_text(json.dumps(VIT))
    name = [name for name, tensor in state.items() if tensor.ndim > 1][1]
    state = {name: tensor.clone() for name, tensor in state.items()}
    state[name].view(-1)[3] = float("inf" if kind == "pth" else "nan")
    (save_file if kind == "safetensors" else torch.save)(state, spec.weights)
    with pytest.raises(ValueError, match=rf"x\.\w+: 1 of \d+ tensors hold NaN or infinity \({name}\)"):
        load_encoder(spec)


@pytest.mark.parametrize("file", ["x.safetensors", "x.pth"])
@pytest.mark.parametrize("content", ["pointer", "cut", "text", "nothing"])
def test_damaged_weight_files_are_named_with_the_way_out(tmp_path, file, content):
    path = tmp_path / file
    state = timm.create_model("test_resnet", pretrained=False, num_classes=0).state_dict()
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    whole = path.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"
    path.write_bytes({"pointer": pointer, "cut": whole[: len(whole) // 2], "text": b"<html>", "nothing": b""}[content])
    message = "is a Git LFS pointer.*git lfs pull" if content == "pointer" else r"bytes\).*download it again"
    if (content, file) == ("text", "x.pth"):
        message = "is an HTML page, not a file of weights; give a safetensors file"
    with pytest.raises(EncoderError, match=rf"{file} .*{message}"):
        load_encoder(EncoderSpec(kind="timm", name="test_resnet", weights=str(path)))


@pytest.mark.parametrize(
    ("content", "kind"), [(b'{"a": 1}', "JSON"), (b"GGUF\3\0\0\0", "a GGUF file"), (b"a: 1", "text")]
)
def test_a_file_that_holds_no_weights_is_called_by_its_kind(tmp_path, content, kind):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(EncoderError, match=rf"x\.pt is {kind}, not a file of weights"):
        load_encoder(EncoderSpec(kind="timm", name="test_resnet", weights=str(tmp_path / "x.pt")))


def test_a_pickle_of_objects_is_refused_without_advice_to_run_it(tmp_path):
    torch.save({"args": argparse.Namespace(lr=1)}, tmp_path / "x.pt")
    with pytest.raises(
        EncoderError, match=r"\(it holds argparse\.Namespace, and a pickle can run code; .* state dict alone"
    ):
        load_encoder(EncoderSpec(kind="timm", name="test_resnet", weights=str(tmp_path / "x.pt")))


@pytest.mark.parametrize(("name", "faster"), [("test_resnet", True), ("test_vit", False)])
def test_convolutions_on_a_cpu_lie_channels_last_and_give_the_same_features(name: str, faster: bool) -> None:
    encoder = load_encoder(EncoderSpec(kind="timm", name=name, weights="random:3"))
    side = encoder.preprocess.size
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    got = encoder.encode_image(images)
    kernels = [part.weight for part in encoder.network.modules() if isinstance(part, torch.nn.Conv2d)]
    large = [kernel for kernel in kernels if kernel.shape[1] > 1 and kernel.shape[2] > 1]
    assert large
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) == faster for kernel in large)
    assert torch.equal(got, encoder.encode_image(images.to(memory_format=torch.channels_last)))
    plain = encoder.network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    torch.testing.assert_close(got, torch.nn.functional.normalize(plain(images), dim=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**VIT, "embed_dim": "8"}, "describes no CLIP that open_clip can build"),
        ({**VIT, "vision_cfg": 3}, "describes no CLIP that open_clip can build"),
        ({**VIT, "text_cfg": {"of": "another version"}}, "describes no CLIP that open_clip can build"),
        ({"model_cfg": VIT, "preprocess_cfg": {"mean": 3}}, "describes no CLIP that open_clip can build"),
        ({"model_cfg": 3}, "its model_cfg is no object"),
    ],
)
def test_a_model_json_that_describes_no_clip_is_named(tmp_path, given, message):
    (tmp_path / "model.json").write_text(json.dumps(given))
    with pytest.raises(EncoderError, match=message):
        load_encoder(EncoderSpec(kind="clip", name="tiny", weights="random:0", config=str(tmp_path / "model.json")))
