"""cafo-prompt: every source, what a stop loses, and what is refused before anything is asked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter import AdaptedModel
from adapter.adaption import AdaptionConfig
from cafo.prompt import COMMANDS, read_prompts
from rayjobs.__main__ import main
from rayjobs.config import load
from rayjobs.inference.class_descriptions import LlamaModel
from rayjobs.jobs import cafo_prompt
from tests.cafo.server import serve

NAMES = ["joshua_tree", "emu", "water lilly"]


def settings(tmp_path: Path, *more: str, classes: list[str] = NAMES) -> cafo_prompt.Config:
    given = [f"class_names={json.dumps(classes)}", f"run.storage={tmp_path / 'runs'}", "run.name=p"]
    return load(cafo_prompt.Config, None, [*given, *more])


def endpoint(url: str) -> list[str]:
    wanted = ["source=endpoint", "endpoint.model=gpt", f"endpoint.base_url={url}", "endpoint.key_variable="]
    return [*wanted, "endpoint.requests_per_minute=60000", "endpoint.retries=0", "answers=2"]


def llama(base: Path, *more: str) -> list[str]:
    return ["source=llama", f"llama.base.path={base}", "answers=3", "sampling.max_tokens=7", *more]


def written(tmp_path: Path, name: str = "p") -> Any:
    return json.loads((tmp_path / "runs" / name / "prompts.json").read_text())


def test_a_file_is_checked_and_the_classes_sentences_are_copied(tmp_path: Path) -> None:
    path = tmp_path / "gpt3.json"
    path.write_text(json.dumps({"joshua tree": ["a"], "emu": ["b", "c"], "water_lilly": ["d"], "other": ["e"]}))
    result = cafo_prompt.run(settings(tmp_path, "source=file", f"file={path}"))
    assert (result["classes"], result["sentences"]) == (3, 4)
    assert written(tmp_path) == {"joshua_tree": ["a"], "emu": ["b", "c"], "water lilly": ["d"]}
    assert read_prompts(result["prompts"], NAMES) == written(tmp_path)
    folder = tmp_path / "runs" / "p"
    assert {"config.yaml", "versions.json", "source.json", "prompts.json", "result.json", "run.json"} <= {
        p.name for p in folder.iterdir()
    }
    path.write_text(json.dumps({"emu": ["b"]}))
    with pytest.raises(ValueError, match="2 of 3 classes: joshua_tree, water lilly"):
        cafo_prompt.run(settings(tmp_path, "source=file", f"file={path}"))


def test_templates_of_a_data_set(tmp_path: Path) -> None:
    for name in ("emu", "joshua_tree"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for i in range(20):
            (tmp_path / "tree" / name / f"{i}.jpg").touch()  # nothing is decoded
    more = ["source=templates", f"data.tree={tmp_path / 'tree'}", "data.templates=['a {}.', 'the {}.']"]
    given = [*more, f"run.storage={tmp_path / 'runs'}", "run.name=p"]
    cafo_prompt.run(load(cafo_prompt.Config, None, given))
    assert written(tmp_path) == {
        "emu": ["a emu.", "the emu."],
        "joshua_tree": ["a joshua tree.", "the joshua tree."],
    }


def test_an_endpoint_is_asked_about_a_class_once(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    with serve(answers_at_once=2) as (url, requests):
        more = endpoint(url)
        cafo_prompt.run(settings(tmp_path, *more, classes=NAMES[:2]))
        assert len(requests) == 2 * len(COMMANDS)
        first = written(tmp_path)
        result = cafo_prompt.run(settings(tmp_path, *more))
        assert len(requests) == 3 * len(COMMANDS)
        assert all("water lilly" in r["messages"][-1]["content"] for r in requests[-len(COMMANDS) :])
        assert (result["classes_asked_now"], result["sentences"]) == (1, 3 * 2 * len(COMMANDS))
        assert {name: written(tmp_path)[name] for name in first} == first
        again = cafo_prompt.run(settings(tmp_path, *more, "endpoint.requests_per_minute=50000"))
        assert again["classes_asked_now"] == 0
        assert len(requests) == 3 * len(COMMANDS)
        with pytest.raises(ValueError, match=r"other settings \(answers was 2, now 5\): choose another run\.name"):
            cafo_prompt.run(settings(tmp_path, *more, "answers=5"))
        assert "answers: 2" in (tmp_path / "runs" / "p" / "config.yaml").read_text()


def test_a_refusing_endpoint_ends_in_one_line_and_keeps_what_was_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai")
    with serve(fail_first=1) as (url, _):
        given = [f"class_names={json.dumps(NAMES)}", f"run.storage={tmp_path / 'runs'}", "run.name=p", *endpoint(url)]
        assert main(["cafo-prompt", *given]) == 2
        terminal = capsys.readouterr().err
        assert "gpt at http://127.0.0.1" in terminal
        assert "slow down" in terminal
        assert "the same command goes on" in terminal
        assert "Traceback" not in terminal
        assert main(["cafo-prompt", *given]) == 0
    assert list(written(tmp_path)) == NAMES


def test_a_llama_answers_all_commands_and_a_stop_changes_nothing(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = llama(tiny_base, "llama.batch_size=4", "commands=['What is a {}?', 'How does a {} look?']")
    whole = cafo_prompt.run(settings(tmp_path, *more, "run.name=whole"))
    assert whole["classes_asked_now"] == 3
    sentences = written(tmp_path, "whole")
    assert len({s for name in NAMES for s in sentences[name]}) > 10  # drawn, not repeated

    decode = LlamaModel._decode

    def stopped(self: LlamaModel, class_name: str, n: int) -> dict[str, list[str]]:
        if class_name == "emu":
            raise KeyboardInterrupt
        return decode(self, class_name, n)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaModel, "_decode", stopped)
        with pytest.raises(KeyboardInterrupt):
            cafo_prompt.run(settings(tmp_path, *more))
    assert list(written(tmp_path)) == ["joshua_tree"]
    result = cafo_prompt.run(settings(tmp_path, *more))
    assert result["classes_asked_now"] == 2
    assert written(tmp_path) == sentences


def test_a_llama_is_asked_through_the_alpaca_template_with_its_adapter(tmp_path: Path, tiny_base: Path) -> None:
    base = AdaptedModel.from_pretrained(tiny_base)
    base.add_adapter(AdaptionConfig(n_layers=2, prompt_length=5))
    draw = torch.Generator().manual_seed(3)
    for parameter in base.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=5.0, generator=draw)
    base.save_adapter(tmp_path / "adapter.safetensors")
    greedy = ["sampling.temperature=0", "answers=1"]
    cafo_prompt.run(settings(tmp_path, *llama(tiny_base, *greedy, f"llama.adapter={tmp_path / 'adapter.safetensors'}")))
    asked = [
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{command.format('joshua tree')}\n\n### Response:"
        for command in COMMANDS
    ]
    expected = base.generate(asked, max_new_tokens=7, temperature=0)
    assert written(tmp_path)["joshua_tree"] == [text for one in expected if (text := " ".join(one.split()))]
    cafo_prompt.run(settings(tmp_path, *llama(tiny_base, *greedy, "run.name=bare")))
    assert written(tmp_path, "bare") != written(tmp_path)
    with pytest.raises(ValueError, match=r"adapter was .*, now None"):
        cafo_prompt.run(settings(tmp_path, *llama(tiny_base, *greedy)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["source=file"], "source is file, so file is required"),
        (["source=endpoint"], "endpoint.model is required"),
        (["source=llama"], "llama.base.path is required"),
        (["source=templates", "data.name=caltech101"], "one of the two"),
        (["source=templates", "class_names=null"], "one of the two"),
        (["source=llama", "llama.base.path=BASE", "commands=['What is it?']"], "one {} for the class name"),
        (["source=llama", "llama.base.path=BASE", "commands=['A {} {x}?']"], "no other braces"),
        (["source=llama", "llama.base.path=BASE", "llama.adapter=none.safetensors"], "none.safetensors"),
        (["source=endpoint", "endpoint.model=m", "endpoint.key_variable=NO_SUCH_KEY"], "NO_SUCH_KEY"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_written(
    tmp_path: Path, tiny_base: Path, more: list[str], message: str
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        cafo_prompt.run(settings(tmp_path, *[text.replace("BASE", str(tiny_base)) for text in more]))
    assert not (tmp_path / "runs").exists()


def test_the_plan_counts_what_is_still_to_be_asked(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = llama(tiny_base)
    cafo_prompt.run(settings(tmp_path, *more, classes=NAMES[:1]))
    capsys.readouterr()
    cafo_prompt.plan(settings(tmp_path, *more))
    assert "2 classes × 5 commands × 3 answers" in capsys.readouterr().out


def test_sentences_of_a_file_fit_a_data_set(tmp_path: Path, caltech: Path) -> None:
    more = ["source=file", f"file={caltech / 'caltech_prompts.json'}", "data.name=caltech101", f"data.root={caltech}"]
    result = cafo_prompt.run(load(cafo_prompt.Config, None, [*more, f"run.storage={tmp_path}", "run.name=p"]))
    assert (result["classes"], result["sentences"]) == (4, 4 * 10)
