"""`AdaptedModel` does what README shows: load, adapt, answer, save, and load again."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adapter
from adapter import AdaptedModel, AdaptionConfig, CheckpointError, GenerationConfig, PromptTemplate, TokenizerError
from adapter.base_checkpoint import save_llama
from adapter.decoder import Llama, LlamaConfig, RMSNorm
from adapter.instruct import ALPACA
from tests.adapter.test_tokenizer import train_model

SIZES = {
    "dim": 24, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 37, "max_seq_len": 32, "vocab_size": 67,
}  # fmt: skip
TEXTS = ["the cat sat on", "a dog", "she sells sea shells"]


def fresh(**sizes: int) -> Llama:
    model = Llama(LlamaConfig(**sizes))
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.reset_parameters()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    save_llama(fresh(**SIZES), folder)
    train_model(folder / "tokenizer.model")
    return folder


def open_gates(model: AdaptedModel) -> None:
    with torch.no_grad():
        for adaption in model.model.adaptions:
            adaption.gate.fill_(0.7)


def test_answer_puts_an_instruction_into_its_template(tiny_base: Path) -> None:
    model = AdaptedModel.from_pretrained(tiny_base)
    greedy = {"max_new_tokens": 9, "temperature": 0.0}
    (text,) = model.generate([ALPACA.render("Say it", "again")], **greedy)
    assert model.answer("Say it", "again", **greedy) == text.strip() != ""
    template = PromptTemplate(with_input="{instruction}: {input}", without_input="{instruction}!")
    (text,) = model.generate(["Say it!"], **greedy)
    assert model.answer("Say it", template=template, **greedy) == text.strip()


def test_a_generation_config_and_its_overrides(tiny_base: Path) -> None:
    model, config = AdaptedModel.from_pretrained(tiny_base), GenerationConfig(max_new_tokens=9, temperature=1.0, seed=3)
    by_keyword = model.generate(["The"], max_new_tokens=9, temperature=1.0, seed=3)
    assert model.generate(["The"], config) == by_keyword
    assert model.generate(["The"], config, temperature=0) == model.generate(["The"], max_new_tokens=9, temperature=0)
    with pytest.raises(TypeError, match="max_tokens"):
        model.generate(["The"], max_tokens=9)
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\], got 2"):
        model.generate(["The"], config, top_p=2)


def test_load_adapt_generate_save(folder: Path, tmp_path: Path) -> None:
    model = AdaptedModel.from_pretrained(folder)
    bare = model.logits(TEXTS)
    assert [row.shape for row in bare] == [(len(model.tokenizer.encode(t, bos=True, eos=False)), 67) for t in TEXTS]
    for text, row in zip(TEXTS, bare, strict=True):  # a batch is its texts
        torch.testing.assert_close(model.logits([text])[0], row, rtol=0, atol=1e-5)
    assert model.logits([]) == []

    model.add_adapter(AdaptionConfig(n_layers=2, prompt_length=5), seed=3)
    assert all(torch.equal(row, was) for row, was in zip(model.logits(TEXTS), bare, strict=True))
    open_gates(model)
    adapted = model.logits(TEXTS)
    assert not torch.equal(adapted[0], bare[0])
    model.save_adapter(tmp_path / "adapter.safetensors", extra={"note": "made in a test"})

    again = AdaptedModel.from_pretrained(folder)
    again.load_adapter(tmp_path / "adapter.safetensors")
    assert all(torch.equal(row, was) for row, was in zip(again.logits(TEXTS), adapted, strict=True))
    assert adapter.read_adapter(tmp_path / "adapter.safetensors").extra == {"note": "made in a test"}
    options = {"max_new_tokens": 6, "seed": 1}
    assert model.generate(TEXTS, **options) == again.generate(TEXTS, **options)


def test_the_seed_decides_the_prompts(folder: Path) -> None:
    model = AdaptedModel.from_pretrained(folder)
    prompts = []
    for seed in (3, 3, 4):
        model.add_adapter(AdaptionConfig(n_layers=2, prompt_length=5), seed=seed)
        prompts.append(model.model.adaptions[0].prompt.clone())
    assert torch.equal(prompts[0], prompts[1])
    assert not torch.equal(prompts[0], prompts[2])


def test_generation_is_text_without_the_prompt(folder: Path) -> None:
    model = AdaptedModel.from_pretrained(folder, dtype=torch.bfloat16)
    answers = model.generate(TEXTS, max_new_tokens=4, temperature=0.0)
    assert len(answers) == len(TEXTS)
    assert all(isinstance(answer, str) for answer in answers)


def test_errors(folder: Path, tmp_path: Path) -> None:
    model = AdaptedModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="window of 32"):
        model.logits(["cat dog " * 40])
    with pytest.raises(ValueError, match="holds no adapter"):
        model.save_adapter(tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match="has 3"):
        model.add_adapter(AdaptionConfig(n_layers=4))
    model.add_adapter(AdaptionConfig(n_layers=1, prompt_length=5))
    model.save_adapter(tmp_path / "adapter.safetensors")

    torch.manual_seed(1)
    save_llama(fresh(**SIZES), tmp_path)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: no tokenizer"):
        AdaptedModel.from_pretrained(tmp_path)
    other = AdaptedModel.from_pretrained(tmp_path, tokenizer=folder / "tokenizer.model")
    with pytest.raises(CheckpointError, match="other weights"):
        other.load_adapter(tmp_path / "adapter.safetensors")
    small = fresh(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=7, vocab_size=11)
    save_llama(small, tmp_path / "small")
    with pytest.raises(TokenizerError, match="only 11"):
        AdaptedModel.from_pretrained(tmp_path / "small", tokenizer=folder)


def test_every_public_name_is_there_and_importing_costs_nothing() -> None:
    for name in adapter.__all__:
        assert getattr(adapter, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Bass'"):
        adapter.Bass  # noqa: B018
    code = "import adapter, sys; assert not {'torch', 'sentencepiece'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
