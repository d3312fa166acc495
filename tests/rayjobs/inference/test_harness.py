"""A model gets the figures from lm-evaluation-harness here that the harness's own backend for transformers gives it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from adapter import AdaptedModel
from adapter.adaption import AdaptionConfig
from adapter.hf import attach
from adapter.templates import ALPACA, ChatTemplate
from rayjobs.config import load, to_dict
from rayjobs.errors import ConfigError, DataError
from rayjobs.inference.harness_model import harness_lm
from rayjobs.inference.harness_tasks import describe_results, evaluate, load_tasks, open_tasks, table_rows
from rayjobs.jobs import adapter_harness
from rayjobs.storage.files import read_json, read_jsonl, write_jsonl
from tests.adapter.tokenizers import samples

pytest.importorskip("lm_eval")
WINDOW = 53
SETTINGS: dict[str, Any] = {
    "num_fewshot": None,
    "limit": None,
    "chat": False,
    "system": None,
    "seed": 7,
    "bootstrap_draws": 10,
}


def write_base(folder: Path) -> LlamaForCausalLM:
    """A tiny random base of transformers beside the tokenizer of a folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    size = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3}
    shape = {**size, "intermediate_size": 41, "vocab_size": len(tokenizer), "max_position_embeddings": WINDOW}
    model = LlamaForCausalLM(LlamaConfig(**shape, **ids, initializer_range=0.4)).eval()
    model.save_pretrained(folder)
    return model


def ours(model: AdaptedModel, template: Any = None) -> Any:
    """The harness's model over ours, in this process."""

    def compute(kind: str, task: Any, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        parts = [records[start : start + 5] for start in range(0, len(records), 5)]
        return [row for part in parts for row in task(model, part, [None] * len(part))]

    return harness_lm(model.tokenizer, template, model.model.config.max_seq_len, compute, token_budget=90)


def theirs(model: LlamaForCausalLM, folder: Path) -> Any:
    """The harness's own model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=3)


@pytest.fixture(scope="module", params=[samples.llama3, samples.llama2, samples.qwen], ids=lambda kind: kind.__name__)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same tiny random base by us and by the harness's own backend."""
    folder = request.param(tmp_path_factory.mktemp("base"))
    model = write_base(folder)
    return ours(AdaptedModel.from_pretrained(folder)), theirs(model, folder)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


LONG = "the cat sat on the mat, and the dog ran after the cat " * 9


def test_log_likelihoods_are_those_of_the_harness_s_own_backend(pair: tuple[Any, Any]) -> None:
    bos = pair[1].tokenizer.bos_token or ""
    contexts = ["", "the cat sat on", "she sells sea shells ", LONG, f"{bos}the dog", "1 <|im_end|> 2", "naïve"]
    given = [(context, option) for context in contexts for option in (" the mat", " sea shore and sea shells", "a")]
    likeliest = [(context, pair[1].tok_decode([token])) for context, token in best_tokens(pair[1], contexts[1:3])]
    mine, other = (lm.loglikelihood(requests(*given, *likeliest), disable_tqdm=True) for lm in pair)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]
    assert any(greedy for _, greedy in mine)
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in other], abs=1e-4)


def best_tokens(lm: Any, contexts: list[str]) -> list[tuple[str, int]]:
    """The likeliest token after each context."""
    ids = [(context, torch.tensor([lm.tok_encode(context.rstrip())])) for context in contexts]
    return [(context.rstrip(), lm.model(one).logits[0, -1].argmax().item()) for context, one in ids]


def test_rolling_log_likelihoods_are_those_of_the_harness_s_own_backend(pair: tuple[Any, Any]) -> None:
    texts = requests(("the cat sat",), (LONG,), (LONG + LONG,), ("a",))
    mine, other = (lm.loglikelihood_rolling(texts) for lm in pair)
    assert mine == pytest.approx(other, abs=2e-3, rel=1e-6)
    assert pair[0].loglikelihood_rolling([]) == []


def test_generated_texts_are_those_of_the_harness_s_own_backend(pair: tuple[Any, Any]) -> None:
    contexts = ["the cat sat on", LONG, "she sells sea shells ", "import x\n"]
    kinds: list[dict[str, Any]] = [{"until": ["e", "\n"], "max_gen_toks": 23}, {"max_gen_toks": 9, "do_sample": False}]
    given = requests(*((context, kind) for kind in kinds for context in contexts))
    mine, other = (lm.generate_until(given) for lm in pair)
    assert mine == other
    assert all("e" not in text for text in mine[:4])
    sampled = requests(*[("the cat", {"do_sample": True, "temperature": 5.0, "max_gen_toks": 9})] * 3)
    drawn = pair[0].generate_until(sampled)
    assert len(set(drawn)) == 3, "equal requests draw other numbers"
    assert drawn == pair[0].generate_until(sampled)
    for kwargs, message in [
        ({"repetition_penalty": 2.0}, "generation_kwargs of a task has repetition_penalty"),
        ({"max_gen_toks": WINDOW}, f"leaves no prompt in a window of {WINDOW} tokens"),
    ]:
        with pytest.raises(ConfigError, match=message):
            pair[0].generate_until(requests(("the cat", kwargs)))
    with pytest.raises(DataError, match="has 0 tokens: it needs 1 to"):
        pair[0].loglikelihood(requests(("the cat", "")))


def test_an_adapter_has_the_figures_that_it_has_in_a_transformers_model(tmp_path: Path) -> None:
    model = write_base(samples.llama3(tmp_path))
    adapted = AdaptedModel.from_pretrained(tmp_path)
    adapted.add_adapter(AdaptionConfig(n_layers=2, prompt_length=3))
    for adaption in adapted.model.adaptions:
        torch.nn.init.constant_(adaption.gate, 0.7)
    adapted.save_adapter(tmp_path / "adapter.safetensors")
    given = requests(*((context, " the mat") for context in ("the cat sat on", "she sells", LONG)))
    texts = requests(("she sells ", {"until": ["\n"], "max_gen_toks": 9}))
    mine, other = ours(adapted), theirs(model, tmp_path)
    bare = other.loglikelihood(given, disable_tqdm=True)
    attach(model, tmp_path / "adapter.safetensors")
    found, expected = (lm.loglikelihood(given, disable_tqdm=True) for lm in (mine, other))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [value for value, _ in found] != pytest.approx([value for value, _ in bare], abs=1e-2)
    assert mine.generate_until(texts) == other.generate_until(texts)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_conversations_are_rendered_as_by_the_harness_s_own_backend(tmp_path: Path) -> None:
    model = write_base(samples.qwen(tmp_path))
    other, mine = theirs(model, tmp_path), ours(AdaptedModel.from_pretrained(tmp_path), ChatTemplate(source=CHATML))
    other.tokenizer.chat_template = CHATML
    turns = [("system", "Be brief."), ("user", "the cat?"), ("assistant", "sat"), ("user", "the dog?")]
    history = [{"role": role, "content": content} for role, content in turns]
    assert mine.apply_chat_template(history) == other.apply_chat_template(history)
    begun = [*history, {"role": "assistant", "content": "It "}]
    assert mine.apply_chat_template(begun, False) == other.apply_chat_template(begun, False)
    assert mine.tok_encode(mine.apply_chat_template(history)) == other.tok_encode(other.apply_chat_template(history))
    assert mine.chat_template(True) == CHATML
    plain = ours(AdaptedModel.from_pretrained(tmp_path), ALPACA)
    first = ALPACA.render("the cat?")
    asked = f"Be brief.\n\n{first}sat<|im_end|>{ALPACA.render_later('the dog?')}"
    assert plain.apply_chat_template(history) == asked
    assert plain.apply_chat_template(begun, False) == f"{asked}It "


def write_tasks(folder: Path) -> Path:
    """A task of each kind, over local records."""
    rows = [
        {"question": f"the {word} {n}", "options": ["sat on the mat", "ran", "sells sea shells"], "right": n % 3}
        for n, word in enumerate(["cat", "dog", "sea", "mat", "shore"] * 2)
    ]
    folder.mkdir()
    write_jsonl(folder / "rows.jsonl", rows)
    files = {"test": str(folder / "rows.jsonl")}
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")}}
    data |= {"test_split": "test", "doc_to_text": "{{question}}"}
    mean = {"aggregation": "mean", "higher_is_better": True}
    tasks: dict[str, dict[str, Any]] = {
        "choose": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "right",
            "num_fewshot": 1,
            "metric_list": [{"metric": name, **mean} for name in ("acc", "acc_norm")],
        },
        "continue": {
            "output_type": "generate_until",
            "doc_to_target": "{{options[right]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
        "read": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}} {{options[0]}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }
    for name, task in tasks.items():
        values = {"task": name, "tag": "ours", **data, **task, "metadata": {"version": 1.0}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.mark.slow
@pytest.mark.ray
def test_tasks_over_workers_have_the_results_of_the_harness_s_own_backend(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")  # seconds of other programs
    base, tasks = samples.llama3(tmp_path / "base"), write_tasks(tmp_path / "tasks")
    model = write_base(base)
    given = {"base": {"path": str(base)}, "task_folder": str(tasks), "tasks": ["ours"], "batch_size": 7, "seed": 7}
    config = load(
        adapter_harness.Config, {**given, "run": {"name": "harness", "storage": str(tmp_path)}, "bootstrap_draws": 10}
    )
    result = adapter_harness.run(config)
    expected = evaluate(theirs(model, base), *open_tasks(["ours"], str(tasks)), **SETTINGS)
    found = read_json(config.run.folder / "results.json")
    assert found["results"].keys() == {"choose", "continue", "read"}
    for task, metrics in expected["results"].items():
        assert found["results"][task] == {
            key: pytest.approx(value, abs=1e-4, rel=1e-5) if isinstance(value, float) else value
            for key, value in metrics.items()
        }
    assert result["tasks"] == table_rows(found)
    assert result["headline"] == describe_results(result["tasks"])
    assert "acc_norm" in (config.run.folder / "report.html").read_text()
    assert len(read_jsonl(config.run.folder / "samples_choose.jsonl")) == 10
    part = next((config.run.folder / "parts" / "loglikelihood").glob("*.parquet"))
    written = part.stat().st_mtime_ns
    assert adapter_harness.run(config) == result
    assert part.stat().st_mtime_ns == written, "what is computed is kept"
    adapted = AdaptedModel.from_pretrained(base)
    adapted.add_adapter(AdaptionConfig(n_layers=2, prompt_length=3))
    adapter = str(tmp_path / "adapter.safetensors")
    adapted.save_adapter(adapter)
    with pytest.raises(ValueError, match=r"other settings \(adapter was none, now"):
        adapter_harness.run(load(adapter_harness.Config, {**to_dict(config), "adapter": adapter}))


def test_what_cannot_be_run_is_refused_before_a_worker_starts(tmp_path: Path, tiny_base: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    (tasks / "broken.yaml").write_text("task: broken\ndataset_path: json\noutput_type: [\n")
    given = {"base": {"path": str(tiny_base)}, "run": {"name": "harness", "storage": str(tmp_path / "runs")}}
    for more, message in [
        ({"tasks": ["chose"], "task_folder": str(tasks)}, "'chose' is no task of .*did you mean choose"),
        ({"tasks": ["x"], "task_folder": str(tmp_path / "none")}, "none, which is no folder"),
        (
            {"tasks": ["choose"], "task_folder": str(tasks), "max_length": 2000},
            "max_length is 2000, more than the window",
        ),
        ({"tasks": ["choose"], "task_folder": str(tasks), "template": "alpaca"}, "set chat=true with it"),
    ]:
        with pytest.raises(ConfigError, match=message):
            adapter_harness.plan(load(adapter_harness.Config, {**given, **more}))
    assert not (tmp_path / "runs").exists()
    manager, names = open_tasks(["choose"], str(tasks))
    (tasks / "rows.jsonl").write_text("{")
    with pytest.raises(ConfigError, match="choose: the harness cannot load it"):
        load_tasks(manager, names)
    (tasks / "deep.yaml").write_text("[" * 100_000)  # ends the process of a reader that calls itself for each level
    with pytest.raises(ConfigError, match=r"task_folder: .*deep\.yaml: not usable YAML: over .* 60 levels"):
        open_tasks(["choose"], str(tasks))


@pytest.mark.slow
def test_a_real_model_has_the_harness_s_own_figures(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    other = theirs(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), smollm2)
    mine = ours(AdaptedModel.from_pretrained(smollm2))
    contexts = ["", "The capital of France is", "Question: Which is a fruit?\nAnswer:"]
    given = requests(*((context, option) for context in contexts for option in (" Paris", " an apple", " a stone.")))
    ours_found, theirs_found = (lm.loglikelihood(given, disable_tqdm=True) for lm in (mine, other))
    assert [greedy for _, greedy in ours_found] == [greedy for _, greedy in theirs_found]
    assert [value for value, _ in ours_found] == pytest.approx([value for value, _ in theirs_found], abs=1e-4)
    texts = requests(("The cat sat on the mat, and the dog ran after it.",))
    assert mine.loglikelihood_rolling(texts) == pytest.approx(other.loglikelihood_rolling(texts), abs=1e-3)
    asked = requests((contexts[1], {"until": ["."], "max_gen_toks": 12}))
    assert mine.generate_until(asked) == other.generate_until(asked)
