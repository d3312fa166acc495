import json
import sys

import pytest
import torch
from torch.nn import functional as F

from cafo.openai_client import Endpoint
from cafo.prompt import (
    COMMANDS,
    EndpointModel,
    describe_classes,
    read_prompts,
    sentences_by_class,
    template_prompts,
    zero_shot_classifier,
)
from tests.cafo.server import serve

NAMES = ("joshua_tree", "emu")


class Fake:
    """Answers that tell what was asked."""

    def __init__(self, silent=()):
        self.asked, self.silent = [], silent

    def describe(self, class_name, command, n):
        self.asked.append((class_name, command))
        if class_name in self.silent:
            raise ConnectionError("gone")
        return [f"{command.format(class_name)} {i}" for i in range(n)] + [" "]


class Letters:
    """A text encoder that counts letters, with a window of 12 characters."""

    def encode_text(self, sentences):
        counts = torch.tensor([[s.lower().count(c) for c in "abcdefghijklm"] for s in sentences]).float()
        return F.normalize(counts + 0.1, dim=-1)

    def is_truncated(self, sentence):
        return len(sentence) > 12


def test_five_commands_ten_answers_and_nothing_asked_twice(tmp_path):
    path = tmp_path / "prompts.json"
    model = Fake(silent={"emu"})
    with pytest.raises(ConnectionError):
        describe_classes(model, NAMES, path)
    assert list(json.loads(path.read_text())) == ["joshua_tree"]
    again = Fake()
    prompts = describe_classes(again, NAMES, path)
    assert {name for name, _ in again.asked} == {"emu"}
    assert [command for _, command in again.asked] == list(COMMANDS)
    assert [len(prompts[name]) for name in NAMES] == [50, 50]
    assert read_prompts(path, NAMES) == prompts
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.json"]


def test_a_model_without_answers_and_a_command_without_braces_are_errors(tmp_path):
    class Mute:
        def describe(self, class_name, command, n):
            return ["", " \n"]

    with pytest.raises(ValueError, match="gave no answer about 'joshua_tree'"):
        describe_classes(Mute(), NAMES, tmp_path / "p.json")
    with pytest.raises(ValueError, match="What is it"):
        describe_classes(Fake(), NAMES, tmp_path / "p.json", commands=("What is it?",))


def test_files_match_with_underscores_or_spaces_and_missing_classes_are_named(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"joshua tree": ["a"], "other": ["b"]}))
    assert read_prompts(path, ["joshua_tree"]) == {"joshua_tree": ["a"]}
    with pytest.raises(ValueError, match="no sentence for 2 of 3 classes: emu, rhino"):
        read_prompts(path, ["joshua_tree", "emu", "rhino"])
    path.write_text(json.dumps({"emu": "a sentence"}))
    with pytest.raises(ValueError, match="'emu' should have a list"):
        read_prompts(path, ["emu"])
    with pytest.raises(ValueError, match="no file"):
        read_prompts(tmp_path / "none.json", ["emu"])


def test_templates_are_the_fallback():
    prompts = template_prompts(("a photo of a {}.", "art of the {}."), NAMES)
    assert prompts["joshua_tree"] == ["a photo of a joshua tree.", "art of the joshua tree."]


def test_the_classifier_is_the_normalised_mean_and_lists_truncated_sentences():
    prompts = {"b": ["bad cab", "a"], "a": ["fig", "deaf badge faded", "hi", "jam"]}
    got = zero_shot_classifier(Letters(), prompts, ["a", "b"])
    for column, name in enumerate("ab"):
        rows = [Letters().encode_text([text])[0] for text in prompts[name]]
        mean = sum(rows) / len(rows)
        torch.testing.assert_close(got.weights[:, column], mean / mean.norm())
    assert got.sentences == 6
    assert got.truncated == ("deaf badge faded",)
    by_class = sentences_by_class(got.embeddings, got.counts)
    in_turn = [prompts["a"], [*prompts["b"], *prompts["b"]]]
    for rows, texts in zip(by_class, in_turn, strict=True):
        torch.testing.assert_close(rows, torch.cat([Letters().encode_text([text]) for text in texts]))
    with pytest.raises(ValueError, match="1 of 2 classes: emu"):
        zero_shot_classifier(Letters(), prompts, ["a", "emu"])


def test_an_endpoint_is_asked_over_http(tmp_path, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("MY_KEY", "secret")
    with serve(fail_first=2, answers_at_once=2) as (url, requests):
        endpoint = Endpoint(
            model="gpt", base_url=url, key_variable="MY_KEY", requests_per_minute=60_000, retries=3, timeout_s=60
        )
        prompts = describe_classes(
            EndpointModel(endpoint), ["joshua_tree"], tmp_path / "p.json", commands=COMMANDS[:2], answers=3
        )
    assert len(prompts["joshua_tree"]) == 6
    assert all("\n" not in s and "joshua tree" in s for s in prompts["joshua_tree"])
    assert {r["key"] for r in requests} == {"Bearer secret"}
    assert [r["n"] for r in requests[2:]] == [3, 1, 3, 1]
    assert len(requests) == 2 + 4


class Clock:
    """Time that passes only while somebody sleeps."""

    now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_the_rate_is_kept(monkeypatch):
    pytest.importorskip("openai")
    clock = Clock()
    monkeypatch.setattr("cafo.openai_client.time", clock)
    with serve(answers_at_once=1) as (url, requests):
        endpoint = Endpoint(model="gpt", base_url=url, key_variable="", requests_per_minute=1200)
        EndpointModel(endpoint).describe("emu", "What is a {}?", 5)
    assert len(requests) == 5
    assert clock.now == pytest.approx(4 * 60 / 1200)


def test_a_missing_key_or_client_is_named(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        EndpointModel(Endpoint(model="gpt")).describe("emu", "{}", 1)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match="`openai` extra"):
        EndpointModel(Endpoint(model="gpt")).describe("emu", "{}", 1)


def test_the_papers_file_of_sentences(caltech):
    """Its keys may have underscores where the class list has spaces."""
    path = caltech / "caltech_prompts.json"
    names = list(json.loads(path.read_text()))
    assert "joshua_tree" in names
    prompts = read_prompts(path, [name.replace("_", " ") for name in names])
    assert all(len(sentences) == 10 for sentences in prompts.values())


@pytest.mark.parametrize("sentences", ["a cat.", ["a cat.", " "], [], None, [["a cat."]], {"a": "cat."}])
def test_sentences_are_lists_of_text_wherever_they_come_from(tmp_path, sentences):
    with pytest.raises(ValueError, match=r"'cat' should have a list of sentences|no sentence for 1 of 2 classes: cat"):
        zero_shot_classifier(Letters(), {"cat": sentences, "dog": ["a dog."]}, ["cat", "dog"])
    (tmp_path / "p.json").write_text(json.dumps({"cat": sentences, "dog": ["a dog."]}))
    with pytest.raises(ValueError, match=r"p\.json.*('cat' should have a list|no sentence for 1 of 2 classes: cat)"):
        read_prompts(tmp_path / "p.json", ["cat", "dog"])


def test_one_class_or_template_in_place_of_a_list_is_refused(tmp_path):
    for use in (
        lambda: template_prompts("a {}.", ["cat"]),
        lambda: template_prompts(["a {}."], "cat"),
        lambda: read_prompts(tmp_path / "p.json", "cat"),
        lambda: describe_classes(Fake(), "cat", tmp_path / "p.json"),
        lambda: describe_classes(Fake(), ["cat"], tmp_path / "p.json", commands="What is a {}?"),
        lambda: zero_shot_classifier(Letters(), {"c": ["c"]}, "c"),
    ):
        with pytest.raises(ValueError, match="should be a list, got the text"):
            use()
