"""The endpoint of classifications answers as the library does, and refuses what is no image by its status."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from starlette.routing import Router
from torch.nn import functional as F

from cafo import CaFo, EncoderSpec
from cafo.cache import Cache, save_cache
from cafo.calibration import Calibration
from cafo.encoders import load_encoder
from cafo.ensemble import Ensemble
from rayjobs.models.encoder import VisionEncoderConfig
from rayjobs.serve import images
from rayjobs.serve.classification import Asked, ClassificationWorker
from rayjobs.serve.classifiers import ClassifierFolder, FeatureSource
from rayjobs.serve.guard import Guard
from rayjobs.serve.image_input import ImageLimits
from rayjobs.serve.images import PATH, ImageRoutes
from rayjobs.serve.metrics import Metrics
from rayjobs.serve.settings import LimitsConfig
from rayjobs.storage.files import write_json
from rayjobs.tune.search_space import Setting
from rayjobs.tune.selection import ChosenSetting, ChosenTrial

NAMES = ("cat", "dog", "lynx", "<b>owl</b>", "鶏")
SPECS = {"small": EncoderSpec(kind="pixels", name="5"), "large": EncoderSpec(kind="pixels", name="7")}
LIMITS = ImageLimits(bytes=60_000, pixels=100_000)


def make_cache(seed: int = 0) -> Cache:
    """Random keys of two encoders, of which both have a say; held-out scores that allow a coverage of 0.8."""
    draw = torch.Generator().manual_seed(seed)
    encoders = {name: load_encoder(spec) for name, spec in SPECS.items()}
    labels = torch.randint(len(NAMES), (13,), generator=draw)
    keys = {n: F.normalize(torch.rand(13, e.width, generator=draw) - 0.4, dim=1) for n, e in encoders.items()}
    return Cache(
        keys=keys,
        labels=labels,
        classifier=F.normalize(torch.rand(encoders["small"].width, len(NAMES), generator=draw) - 0.5, dim=0) / 20,
        class_names=NAMES,
        zero_shot_source="small",
        encoders={name: encoder.identity for name, encoder in encoders.items()},
        alpha=0.9,
        beta=3.1,
        ensemble=Ensemble(temperature=50.0, scales={"large": 0.7}),
        calibration=Calibration(temperature=2.3, scores=torch.linspace(0, 0.9, 11)),
        key_names=tuple(f"{NAMES[label]}/{row}.jpg" for row, label in enumerate(labels.tolist())),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved classifier `pets`, and a run `inner/sweep` whose best choice is another one."""
    save_cache(make_cache(), tmp_path / "pets.safetensors")
    run = tmp_path / "inner" / "sweep"
    save_cache(make_cache(1), run / "trials" / "best" / "cache.safetensors")
    encoders = {name: {"kind": spec.kind, "name": spec.name} for name, spec in SPECS.items()}
    write_json(run / "sweep.json", {"encoders": encoders, "data": {"kind": "folder"}})
    setting = Setting(0, 4, tuple(SPECS), "baseline zero-shot", "templates", 1e-2, 3, 2.0, 5.5)
    trial = ChosenTrial(seed=1, trial="best", accuracy=0.5, alpha=0.9, beta=3.1, ensemble=None)
    chosen = ChosenSetting(
        shots=2, method="CaFo", group={}, setting=setting, select="val", accuracy=0.5, finished=1, stopped=0,
        seeds=(trial,),
    )  # fmt: skip
    write_json(run / "chosen.json", {"chosen": [chosen.to_json()]})
    return tmp_path


@pytest.fixture
def classifiers(folder: Path) -> ClassifierFolder:
    encoders = {name: VisionEncoderConfig(kind="pixels", name=spec.name) for name, spec in SPECS.items()}
    return ClassifierFolder(folder, encoders=encoders)


@pytest.fixture
def worker(classifiers: ClassifierFolder) -> Iterator[ClassificationWorker]:
    worker = ClassificationWorker(classifiers, batch=8, max_waiting=5)
    yield worker
    worker.close()


def ask(worker: ClassificationWorker, talk: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    """Talk to the worker's endpoint as a client over HTTP does."""

    async def session() -> Any:
        routes = ImageRoutes(worker, LIMITS).routes()
        app: Any = Guard(Router(routes), limits=LimitsConfig(), metrics=Metrics())
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await talk(client)

    return asyncio.run(session())


def picture(number: int = 0, side: int = 23) -> Image.Image:
    pixels = torch.randint(256, (side, side + 6, 3), generator=torch.Generator().manual_seed(number))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def encoded(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()


def test_an_answer_is_the_librarys_prediction_and_its_evidence_adds_up(
    worker: ClassificationWorker, folder: Path
) -> None:
    image = picture()
    model = CaFo.load(folder / "pets.safetensors", SPECS)
    (expected,), logits = model.predict([image], top=3, coverage=0.8), model.logits([image])[0]
    body = {"model": "pets", "image": encoded(image), "top": 3, "evidence": 4, "coverage": 0.8}

    async def talk(client: httpx.AsyncClient) -> list[httpx.Response]:
        url = f"data:image/png;base64,{body['image']}"
        form = {"model": "pets", "top": "3", "evidence": "4", "coverage": "0.8"}
        return [
            await client.post(PATH, json=body),
            await client.post(PATH, json={**body, "image": url}),
            await client.post(PATH, data=form, files={"image": ("c\r\n.png", png(image), "image/png")}),
        ]

    answers = ask(worker, talk)
    assert [answer.status_code for answer in answers] == [200] * 3, answers[0].text
    first = answers[0].json()
    assert all(answer.json() == first for answer in answers)
    assert (first["object"], first["model"], first["calibrated"]) == ("image.classification", "pets", True)
    assert [(one["label"], one["probability"]) for one in first["data"]] == [
        (one.class_name, pytest.approx(one.probability)) for one in expected.top
    ]
    assert first["margin"] == pytest.approx(expected.margin)
    assert first["prediction_set"] == list(expected.prediction_set or ())
    why = first["evidence"]
    assert len(why["images"]) == 4
    assert {(one["name"], one["label"]) for one in why["images"]} <= {
        (name, NAMES[label]) for name, label in zip(model.cache.key_names, model.cache.labels.tolist(), strict=True)
    }
    difference = float(logits[NAMES.index(why["label"])] - logits[NAMES.index(why["rival"])])
    total = why["text"] + sum(one["weight"] for one in why["images"]) + why["other_images"]
    assert why["difference"] == pytest.approx(difference, abs=1e-4)
    assert total == pytest.approx(difference, abs=1e-4)


def test_the_best_choice_of_a_run_is_served_and_classifiers_are_listed(
    worker: ClassificationWorker, folder: Path
) -> None:
    image = picture(1)
    expected = CaFo.load(folder / "inner/sweep/trials/best/cache.safetensors", SPECS).predict([image])[0]

    async def talk(client: httpx.AsyncClient) -> tuple[httpx.Response, httpx.Response]:
        body = {"model": "inner/sweep", "image": encoded(image), "evidence": 0}
        return await client.get(PATH), await client.post(PATH, json=body)

    listed, answer = ask(worker, talk)
    assert [model["id"] for model in listed.json()["data"]] == ["inner/sweep", "pets"]
    assert answer.json()["data"][0]["label"] == expected.class_name
    assert answer.json()["evidence"] is None


def test_a_file_that_was_replaced_is_read_again_and_one_that_is_gone_is_not_served(
    classifiers: ClassifierFolder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = classifiers.load("pets")
    with monkeypatch.context() as patched:
        patched.setattr(classifiers, "paths", lambda: pytest.fail("the folder is looked through again"))
        assert classifiers.load("pets") is first
    save_cache(replace(make_cache(), alpha=0.1), folder / "pets.safetensors")
    assert classifiers.load("pets").opened.classifier.alpha == 0.1  # type: ignore[union-attr]
    (folder / "pets.safetensors").unlink()
    with pytest.raises(ValueError, match="there is no classifier 'pets'; there are: inner/sweep"):
        classifiers.load("pets")


def test_the_least_recently_used_classifier_leaves(classifiers: ClassifierFolder) -> None:
    classifiers.keep = 1
    pets = classifiers.load("pets")
    sweep = classifiers.load("inner/sweep")
    assert classifiers.load("inner/sweep") is sweep
    assert classifiers.load("pets") is not pets


def test_images_that_wait_are_encoded_together_and_each_gets_its_own_answer(
    worker: ClassificationWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, images = Asked(top=5, evidence=2), [picture(number) for number in range(6)]
    names = ["pets", "inner/sweep", "pets", "pets", "inner/sweep", "pets"]
    alone = [worker.submit(name, image, asked).result() for name, image in zip(names, images, strict=True)]
    sizes: list[int] = []
    encode, began, goes_on = FeatureSource.encode, threading.Event(), threading.Event()

    def slow(self: FeatureSource, batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        began.set()
        goes_on.wait()
        return encode(self, batch)

    monkeypatch.setattr(FeatureSource, "encode", slow)
    futures = [worker.submit(names[0], images[0], asked)]
    began.wait()
    futures += [worker.submit(name, image, asked) for name, image in zip(names[1:], images[1:], strict=True)]
    with pytest.raises(ValueError, match="5 images wait already"):
        worker.submit("pets", images[0], asked)
    futures[3].cancel()
    goes_on.set()
    together = [None if future.cancelled() else future.result() for future in futures]
    assert sizes == [1, 1, 4, 4], "two encoders; both classifiers read both; one image was given up"
    for got, expected in zip(together, alone, strict=True):
        if got is not None:
            assert [one["label"] for one in got["data"]] == [one["label"] for one in expected["data"]]
            assert got["margin"] == pytest.approx(expected["margin"], abs=1e-5)


def test_an_image_that_fails_fails_no_other(worker: ClassificationWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, began, goes_on = FeatureSource.encode, threading.Event(), threading.Event()

    def fails_on_black(self: FeatureSource, batch: torch.Tensor) -> torch.Tensor:
        began.set()
        goes_on.wait()
        if (batch.flatten(1).amax(dim=1) == 0).any():
            raise ArithmeticError("black")
        return encode(self, batch)

    monkeypatch.setattr(FeatureSource, "encode", fails_on_black)
    first = worker.submit("pets", picture(), Asked())
    began.wait()
    black, other = (worker.submit("pets", one, Asked()) for one in (Image.new("RGB", (9, 9)), picture(1)))
    goes_on.set()
    with pytest.raises(ArithmeticError):
        black.result()
    assert first.result()["data"]
    assert other.result()["data"]


def test_a_worker_that_is_closed_leaves_nobody_waiting(
    classifiers: ClassifierFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = ClassificationWorker(classifiers)
    encode, began, goes_on = FeatureSource.encode, threading.Event(), threading.Event()

    def slow(self: FeatureSource, batch: torch.Tensor) -> torch.Tensor:
        began.set()
        goes_on.wait()
        return encode(self, batch)

    monkeypatch.setattr(FeatureSource, "encode", slow)
    first = worker.submit("pets", picture(), Asked())
    began.wait()
    closing = threading.Thread(target=worker.close)
    closing.start()
    goes_on.set()
    closing.join()
    assert first.result()["data"]
    with pytest.raises(ValueError, match="closing"):
        worker.submit("pets", picture(), Asked())


ENCAPSULATED = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
BAD = {
    "no JSON": (b"{", 400, None),
    "no object": (b"[]", 400, None),
    "no image": ({"image": None}, 400, "image"),
    "not base64": ({"image": "***"}, 400, "image"),
    "letters beyond ASCII": ({"image": "é" * 8}, 400, "image"),
    "a URL": ({"image": "http://127.0.0.1/a.png"}, 400, "image"),
    "a path": ({"image": "/etc/hostname"}, 400, "image"),
    "a text": ({"image": base64.b64encode(b"hello").decode()}, 400, "image"),
    "a program's language": ({"image": base64.b64encode(ENCAPSULATED).decode()}, 400, "image"),
    "cut short": ({"image": base64.b64encode(png(picture())[:-700]).decode()}, 400, "image"),
    "many pixels": ({"image": encoded(Image.new("1", (1000, 101)))}, 413, "image"),
    "far too many pixels": ({"image": encoded(Image.new("1", (20_000, 10_000)))}, 413, "image"),
    "many bytes": ({"image": base64.b64encode(bytes(60_001)).decode()}, 413, "image"),
    "far too many bytes": ({"image": "A" * 100_000}, 413, "image"),
    "another classifier": ({"model": "../pets"}, 404, "model"),
    "a file": ({"model": "pets.safetensors"}, 404, "model"),
    "no class": ({"top": 0}, 400, "top"),
    "a coverage beyond 1": ({"coverage": 1.5}, 400, "coverage"),
    "a coverage for which there are too few images": ({"coverage": 0.99}, 400, "coverage"),
    "an unknown key": ({"tpo": 3}, 400, "tpo"),
}


def test_what_is_refused_says_which_parameter_and_why(worker: ClassificationWorker) -> None:
    good = {"model": "pets", "image": encoded(picture())}

    async def talk(client: httpx.AsyncClient) -> dict[str, httpx.Response]:
        answers = {}
        for name, (change, _, _) in BAD.items():
            content = change if isinstance(change, bytes) else json.dumps({**good, **change}).encode()
            answers[name] = await client.post(PATH, content=content)
        answers["good"] = await client.post(PATH, json=good)
        return answers

    answers = ask(worker, talk)
    assert answers.pop("good").status_code == 200
    for name, answer in answers.items():
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == BAD[name][1:], (name, answer.text)
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]


def test_forms_keep_any_bytes_and_odd_forms_are_refused(worker: ClassificationWorker) -> None:
    content, seen = bytes(range(256)) * 3 + b"\r\n--\r\r\n\n\r\n", list[bytes]()
    headers = {"content-type": "multipart/form-data; boundary=b"}

    async def talk(client: httpx.AsyncClient) -> list[httpx.Response]:
        request = client.build_request("POST", PATH, data={"model": "pets"}, files={"image": content})
        fields, image = images.read_request(request.headers["content-type"], await request.aread())
        assert (fields.model, fields.top) == ("pets", 5)
        assert isinstance(image, bytes)
        seen.append(image)
        part = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\npets\r\n'
        bodies = [b"", b"--b--", part + b"--b--", part * 2 + b"--b--", b"--b\r\n\r\nx\r\n--b--", content, part]
        answers = [await client.post(PATH, content=body, headers=headers) for body in bodies]
        return [*answers, await client.post(PATH, content=content, headers={"content-type": "multipart/form-data"})]

    assert [*(answer.status_code for answer in ask(worker, talk)), seen] == [*[400] * 8, [content]]


def test_a_classifier_that_cannot_be_loaded_tells_clients_nothing_of_the_servers_files(
    worker: ClassificationWorker, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_cache(replace(make_cache(), encoders={"small": "other", "large": "other"}), folder / "pets.safetensors")
    (folder / "inner/sweep/chosen.json").write_text("{}")

    async def talk(client: httpx.AsyncClient) -> list[httpx.Response]:
        image = encoded(picture())
        return [await client.post(PATH, json={"model": name, "image": image}) for name in ("pets", "inner/sweep")]

    for answer in ask(worker, talk):
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "model_not_loaded"
        assert str(folder) not in answer.text
    assert "was fitted with other" in caplog.text
    assert "is no choice" in caplog.text
