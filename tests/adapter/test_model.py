"""`AdaptedModel` does what README shows: load, adapt, answer, save, and load again."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adapter
from adapter import (
    AdaptedModel,
    AdapterError,
    AdaptionConfig,
    ChatTemplate,
    CheckpointError,
    GenerationConfig,
    PromptTemplate,
    RecordError,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
)
from adapter.base.checkpoint import save_decoder
from adapter.decoder import Decoder, RMSNorm
from adapter.decoder_config import DecoderConfig
from adapter.generate import generate
from adapter.records.encoding import encode_record
from adapter.templates import ALPACA
from tests.adapter.tokenizers.test_sentence_piece import train_model

SIZES = {
    "dim": 24, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 37, "max_seq_len": 32, "vocab_size": 67,
}  # fmt: skip
PLAIN = PromptTemplate(with_input="{instruction} {input}", without_input="{instruction}")
TEXTS = ["the cat sat on", "a dog", "she sells sea shells"]


def fresh(**sizes: int) -> Decoder:
    model = Decoder(DecoderConfig(**sizes))
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.reset_parameters()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    save_decoder(fresh(**SIZES), folder)
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


def test_an_adapter_answers_and_chats_in_the_template_that_it_was_trained_in(tiny_base: Path, tmp_path: Path) -> None:
    model, greedy = AdaptedModel.from_pretrained(tiny_base), {"max_new_tokens": 9, "temperature": 0.0}
    model.add_adapter(AdaptionConfig(n_layers=2, prompt_length=3))
    assert model.template is None
    model.template = template = PromptTemplate(
        with_input="{instruction}: {input}", without_input="{instruction}!", later="; {instruction}!"
    )
    model.save_adapter(tmp_path / "a.safetensors")
    model = AdaptedModel.from_pretrained(tiny_base)
    model.load_adapter(tmp_path / "a.safetensors")
    assert model.template == template
    model.add_adapter(AdaptionConfig(n_layers=1))
    assert model.template is None, "a fresh adapter was trained in none"
    model.load_adapter(tmp_path / "a.safetensors")
    assert model.answer("the cat", "sat", **greedy) == model.generate(["the cat: sat"], **greedy)[0].strip() != ""
    question, eos = {"role": "user", "content": "the cat"}, [model.tokenizer.eos_id]
    assert model.chat([question], **greedy) == model.answer("the cat", **greedy) != ""
    talk = [question, {"role": "assistant", "content": "ran"}, {"role": "user", "content": "on"}]
    encode = functools.partial(model.tokenizer.encode, eos=False)
    ids = encode("the cat!ran", bos=True) + eos + encode("; on!", bos=False)
    assert model.chat(talk, **greedy) == model.generate_from_ids([ids], **greedy)[0].strip()
    long = [*talk[:2] * 99, talk[2]]
    assert model.chat(long, **greedy), "the oldest turns leave"
    with pytest.raises(RecordError, match="leaves no room for an answer in the base's window of 1024"):
        model.chat([{"role": "user", "content": "cat " * 2000}], **greedy)
    with pytest.raises(RecordError, match="no question at its end"):
        model.chat(talk[:2], **greedy)
    turns = ChatTemplate(source="{% for m in messages %}{{ m.content }} {% endfor %}")
    text = model.generate_from_ids([model.tokenizer.encode_rendered("the cat ran on ").ids], **greedy)[0]
    assert model.chat(talk, template=turns, **greedy) == text.strip()


def test_a_base_without_an_adapter_chats_in_its_own_template(tiny_base: Path) -> None:
    model = AdaptedModel.from_pretrained(tiny_base)
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    question = {"role": "user", "content": "the cat"}
    ids = [*model.tokenizer.encode_rendered("the cat").ids, model.tokenizer.eos_id]
    greedy = {"max_new_tokens": 9, "temperature": 0.0}
    assert model.chat([question], **greedy) == model.generate_from_ids([ids], **greedy)[0].strip() != ""
    model.add_adapter(AdaptionConfig(n_layers=2, prompt_length=3))
    assert model.chat([question], **greedy) == model.answer("the cat", **greedy)


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


def test_a_base_whose_adapter_is_taken_off_computes_the_same_bits_as_before(folder: Path) -> None:
    model = AdaptedModel.from_pretrained(folder)
    before = model.logits("some text")[0]
    model.remove_adapter()  # there is none
    model.add_adapter(AdaptionConfig(n_layers=2, prompt_length=3))
    for adaption in model.model.adaptions:
        torch.nn.init.constant_(adaption.gate, 0.5)
    assert not torch.equal(model.logits("some text")[0], before)
    model.remove_adapter()
    assert torch.equal(model.logits("some text")[0], before)
    with pytest.raises(AdapterError, match="no adapter"):
        model.save_adapter(folder / "none.safetensors")


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


TALES = ["the cat", "she sells ", "a dog\n", "漢 🙂", "the\ncat  sat", ""]


def llamas_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer that keeps every character, as LLaMA's does: bytes spell what has no piece."""
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    return load_tokenizer(train_model(path, byte_fallback=True, vocab_size=331, **options))


@pytest.mark.parametrize("seed", range(8))
def test_prompt_and_new_text_join_to_the_text_of_all_tokens(tmp_path: Path, seed: int) -> None:
    tokenizer = llamas_tokenizer(tmp_path / "tokenizer.model")
    torch.manual_seed(seed)
    model = AdaptedModel(fresh(**{**SIZES, "vocab_size": tokenizer.vocab_size}), tokenizer)
    options = {"max_new_tokens": 9, "temperature": 1.0, "top_p": 1.0, "seed": seed}
    prompts = [tokenizer.encode(tale, bos=True, eos=False) for tale in TALES]
    new = generate(model.model, prompts, eos_ids=tokenizer.eos_ids, **options)
    texts = model.generate(TALES, **options)
    for tale, prompt, ids, text in zip(TALES, prompts, new, texts, strict=True):
        assert tale + text == tokenizer.decode([*prompt, *ids])


@pytest.mark.parametrize("whole", ["the cat sat", "the cat\nsat", "the cat  sat", "a 漢", "a 漢字 b", "\n\na"])
def test_a_continuation_is_exact_wherever_the_prompt_ends(tmp_path: Path, whole: str) -> None:
    tokenizer = llamas_tokenizer(tmp_path / "tokenizer.model")
    ids = tokenizer.encode(whole, bos=True, eos=False)
    assert tokenizer.continuation(ids, []) == ""
    for end in range(1, len(ids)):
        known = tokenizer.decode(ids[:end]).rstrip("�")  # of a character that the prompt holds some bytes of, nothing
        assert known + tokenizer.continuation(ids[:end], ids[end:]) == whole


def test_a_new_word_begins_with_its_space(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    (prompt, new) = (tokenizer.encode(text, bos=False, eos=False) for text in ("the cat", "sat on"))
    assert tokenizer.decode([*prompt, *new]) == "the cat sat on"
    assert tokenizer.continuation(prompt, new) == " sat on"


def test_a_string_is_one_prompt_and_not_its_letters(folder: Path) -> None:
    model, options = AdaptedModel.from_pretrained(folder), {"max_new_tokens": 5, "temperature": 0.0}
    assert model.generate("the cat", **options) == model.generate(["the cat"], **options)
    (row,) = model.logits("the cat")
    assert torch.equal(row, model.logits(["the cat"])[0])
    example = encode_record({"instruction": "a", "output": "b"}, model.tokenizer, PLAIN)
    for wrong in ("the cat", ["the cat"], example):
        with pytest.raises(AdapterError, match="losses are of a list of `Example`, as `encode_record` makes them, got"):
            model.losses(wrong)
    for wrong in ([1, 2, 3], "the cat", ["the cat"]):
        with pytest.raises(AdapterError, match=r"prompt 0 is .*, not a list of ids"):
            model.generate_from_ids(wrong)
    for wrong in ([None], [b"the cat"], [["the cat"]]):
        with pytest.raises(TokenizerError, match="a text is a string, got"):
            model.generate(wrong)
    with pytest.raises(TokenizerError, match=r"'\\ud83d' at character 5 is half of a surrogate pair"):
        model.generate("the \ud83d")


def test_images_are_one_for_each_row(folder: Path) -> None:
    model = AdaptedModel.from_pretrained(folder)
    example = encode_record({"instruction": "a", "output": "b"}, model.tokenizer, PLAIN)
    for measure in (model.generate, model.logits):
        with pytest.raises(AdapterError, match="1 images for 3 rows: give one to each row"):
            measure(TEXTS, images=[None])
    with pytest.raises(AdapterError, match="1 images for 2 rows"):
        model.losses([example, example], images=[None])


def test_an_adapter_file_is_read_by_its_content_whatever_its_name(folder: Path, tmp_path: Path) -> None:
    model = AdaptedModel.from_pretrained(folder)
    model.add_adapter(AdaptionConfig(n_layers=2, prompt_length=5), seed=3)
    open_gates(model)
    expected = model.logits(TEXTS)
    for name in ("x.pt", "x.pth", "x.bin", "x", "x.safetensors"):
        model.save_adapter(tmp_path / name)
        again = AdaptedModel.from_pretrained(folder)
        again.load_adapter(tmp_path / name)
        assert all(torch.equal(row, was) for row, was in zip(again.logits(TEXTS), expected, strict=True))
    file = adapter.read_adapter(tmp_path / "x")
    for name in ("x.pt", "x.pth", "x.bin", "x"):
        adapter.export_adapter(file, tmp_path / f"v1-{name}", "v1", again.model.config, gate="tanh")
        assert torch.equal(adapter.read_adapter(tmp_path / f"v1-{name}", gate="tanh").prompt, file.prompt)


def test_a_longer_example_than_the_window_is_refused(folder: Path) -> None:
    model = AdaptedModel.from_pretrained(folder)
    example = encode_record({"instruction": "a", "output": "cat dog " * 40}, model.tokenizer, PLAIN)
    with pytest.raises(AdapterError, match="does not fit the base's window of 32"):
        model.losses([example])


def test_a_neighbours_tokenizer_is_not_used(folder: Path, tmp_path: Path) -> None:
    """A folder in Hugging Face's format has its own tokenizer or none; what lies beside it belongs to others."""
    own = tmp_path / "model"
    save_decoder(fresh(**SIZES), own)
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    with pytest.raises(TokenizerError, match=r"model: neither tokenizer\.json nor tokenizer\.model is in this folder"):
        AdaptedModel.from_pretrained(own)
    (own / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"model/tokenizer\.json: not a Hugging Face tokenizer"):
        AdaptedModel.from_pretrained(own)
    AdaptedModel.from_pretrained(own, tokenizer=folder / "tokenizer.model")  # named, it is what is wanted


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
    save_decoder(fresh(**SIZES), tmp_path)
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor tokenizer\.model is in this folder"):
        AdaptedModel.from_pretrained(tmp_path)
    other = AdaptedModel.from_pretrained(tmp_path, tokenizer=folder / "tokenizer.model")
    with pytest.raises(CheckpointError, match="other weights"):
        other.load_adapter(tmp_path / "adapter.safetensors")
    small = fresh(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=7, vocab_size=11)
    save_decoder(small, tmp_path / "small")
    with pytest.raises(TokenizerError, match="only 11"):
        AdaptedModel.from_pretrained(tmp_path / "small", tokenizer=folder)


def test_every_public_name_is_there_and_importing_costs_nothing() -> None:
    for name in adapter.__all__:
        assert getattr(adapter, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Bass'"):
        adapter.Bass  # noqa: B018
    code = "import adapter, sys; assert not {'torch', 'sentencepiece'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
