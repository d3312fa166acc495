import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from cafo.datasets import load_generated_list
from cafo.errors import ImageError
from cafo.files import read_json
from cafo.generate import DiffusersGenerator, EndpointGenerator, FolderGenerator, GenerationJob, best_per_class
from cafo.images import Preprocess
from cafo.items import Item
from cafo.openai_client import Endpoint
from tests.cafo.server import serve

NAMES = ("crane", "emu_bird", "crane")
CLASSIFIER = torch.eye(3)


class Colours:
    """An encoder whose features are the means of the colour channels."""

    name, identity, width = "colours", "colours-1", 3
    preprocess = Preprocess(size=4, resize=4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def encode_image(self, batch):
        return F.normalize(batch.mean(dim=(2, 3)) + 1e-6, dim=-1)

    def multi_scale(self, batch, blocks=4):
        return [self.encode_image(batch)]


class Painter:
    """Candidate i of class c has i parts of the class's own channel among noise."""

    def __init__(self, fail_on=None):
        self.requests, self.fail_on = [], fail_on

    def generate(self, class_name, prompt, n, seed):
        if seed == self.fail_on:
            raise KeyboardInterrupt
        self.requests.append((class_name, prompt, seed))
        for i in (3, 0, 4, 1, 2)[:n]:
            colour = [90, 90, 90]
            colour[seed % 3] = 100 + 30 * i
            yield Image.new("RGB", (6, 5), tuple(colour))
        yield ImageError("candidate 5: broken")


def make(tmp_path, painter, **kwargs):
    return GenerationJob(
        generator=painter,
        encoder=Colours(),
        classifier=CLASSIFIER,
        class_names=NAMES,
        template="a photo of a {}.",
        folder=tmp_path,
        candidates=5,
        **kwargs,
    )


def test_clip_keeps_the_best_in_order(tmp_path):
    reports = []
    path = make(tmp_path, Painter(), keep=3).run(lambda *report: reports.append(report))
    items = load_generated_list(path, NAMES)
    assert [(i.label, i.class_name) for i in items] == [(0, "crane")] * 3 + [(1, "emu_bird")] * 3 + [(2, "crane")] * 3
    content = read_json(path, "")
    for label in range(3):
        own = [i for i in items if i.label == label]
        colours = [Image.open(tmp_path / i.path).getpixel((0, 0))[label] for i in own]
        assert colours == [220, 190, 160]
        scores = [content["scores"][i.path] for i in own]
        assert scores == sorted(scores, reverse=True)
    assert content["prompts"][items[3].path] == "a photo of a emu bird."
    assert reports[0] == ("crane", 3, ["candidate 5: broken"])
    assert best_per_class(items, 1) == tuple(items[i] for i in (0, 3, 6))


def test_an_interruption_loses_one_class_and_other_settings_are_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Painter(fail_on=2), keep=2).run()
    painter = Painter()
    path = make(tmp_path, painter, keep=2).run()
    assert [seed for *_, seed in painter.requests] == [2]
    assert len(load_generated_list(path, NAMES)) == 6
    assert not list(tmp_path.rglob("*.tmp"))
    with pytest.raises(ValueError, match="other settings"):
        make(tmp_path, Painter(), keep=3).run()
    with pytest.raises(ValueError, match="keep must be"):
        make(tmp_path / "new", Painter(), keep=6)
    other = replace(make(tmp_path, Painter(), keep=2), class_names=("crane", "auk", "emu_bird"))
    with pytest.raises(ValueError, match=r"00001/000\.png is of class 1, 'emu_bird', which is now 'auk'"):
        other.run()
    with pytest.raises(ValueError, match="a template needs one"):
        replace(other, template="a photo")


def test_a_folder_of_images_generated_before(tmp_path):
    for folder, colour in (("crane", "red"), ("emu bird", "lime")):
        (tmp_path / "in" / folder).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (5, 5), colour).save(tmp_path / "in" / folder / f"{i}.png")
    (tmp_path / "in" / "crane" / "1.png").write_bytes(b"broken")
    reports = []
    path = GenerationJob(
        generator=FolderGenerator(tmp_path / "in"),
        encoder=Colours(),
        classifier=CLASSIFIER,
        class_names=NAMES[:2],
        template="{}",
        folder=tmp_path / "out",
        keep=3,
    ).run(lambda name, kept, rejected: reports.append((name, kept, len(rejected))))
    assert reports == [("crane", 2, 1), ("emu_bird", 3, 0)]
    assert len(load_generated_list(path, NAMES[:2])) == 5
    with pytest.raises(ValueError, match="no folder 'rhino'"):
        list(FolderGenerator(tmp_path / "in").generate("rhino", "", 1, 0))
    with pytest.raises(ValueError, match="no folder"):
        FolderGenerator(tmp_path / "none")


def test_an_images_endpoint(tmp_path):
    pytest.importorskip("openai")
    with serve() as (url, requests):
        endpoint = Endpoint(model="dall-e", base_url=url, key_variable="", requests_per_minute=60_000)
        images = list(EndpointGenerator(endpoint).generate("emu", "a photo of an emu.", 3, 0))
    assert [image.size for image in images] == [(5, 7)] * 3
    assert {r["prompt"] for r in requests} == {"a photo of an emu."}


def test_diffusers_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="`diffusers` extra"):
        DiffusersGenerator("some/model")


def test_best_per_class_of_any_list():
    items = [Item(f"{i}", i % 2, "x") for i in range(7)]
    assert [i.path for i in best_per_class(items, 2)] == ["0", "1", "2", "3"]
