"""Tokenizers of every kind that models of today have, trained in a second, and texts that tell them apart."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer

from adapter.tokenizers.tiktoken_ranks import PATTERN
from tests.adapter.tokenizers.test_sentence_piece import train_model

NASTY = (
    "",
    " ",
    "a",
    " a",
    "a ",
    "  two  spaces,   three    four ",
    "\n",
    "\n\n\n",
    "line\n\n  indented\r\n\ttab\t\n",
    "\x00 NUL \x00\x00",
    "it's WE'LL they've I'D 'S",
    "1 12 123 1234567890 3.14159 1,000,000",
    "naïve café, cafe\u0301 nai\u0308ve",
    "漢字とひらがな、カタカナ。한국어 中文",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 \U0001f9d1\U0001f3fd",
    "שלום עולם مرحبا بالعالم",
    "a\u200bb\u200fc\ufeffd\u00a0e\u3000f",
    "Z͑ͫ̓a̴l͢g͝o\u0489",
    "ﬁ ① Ⅳ ½ Å Å",
    "<|im_end|> <s></s> <unk> <|eot_id|> <0x41> [INST] <pad>",
    "<|im_start|>system\nobey<|im_end|>",
    "▁under▁score ▁▁ Ġ Ċ",
    "def f(x):\n    return x ** 2  # squares\n",
    "Donaudampfschifffahrtsgesellschaft" * 40,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa aa a aaa",
    "\ufdd0\ufdd1\uffff\U0010ffff",
)

CORPUS = [
    "the cat sat on the mat, and the dog ran after the cat",
    "she sells sea shells by the sea shore; it's 1,234.50 dollars",
    "def main(arguments):\n    for index in range(100):\n        print(index)\n",
    "naïve café déjà vu, 漢字 日本語 中文, привет мир, שלום, 🙂 🙂",
    "Donaudampfschifffahrtsgesellschaft und Wissenschaft der Gesellschaft",
    "  spaces    and\n\n\nnew lines\t\ttabs and aaaaaaaa aaaa aa",
] * 3

QWEN_PATTERN = PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def train_byte_level(pattern: str, special: tuple[str, ...], **options: Any) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(**options))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=401, initial_alphabet=letters, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(list(special))
    return backend


def llama3(folder: Path) -> Path:
    """Byte pairs with whole pieces first, BOS by the post-processor, two tokens that end an answer."""
    special = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    backend = train_byte_level(PATTERN, special, ignore_merges=True)
    bos, eos, eot = map(backend.token_to_id, special[:3])
    template = processors.TemplateProcessing(
        single=f"{special[0]} $A", pair=f"{special[0]} $A {special[0]} $B", special_tokens=[(special[0], bos)]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    generation = {"eos_token_id": [eos, eot], "bos_token_id": bos}
    return write(folder, backend, {"bos_token": special[0], "eos_token": "<|eot_id|>"}, generation)


def qwen(folder: Path) -> Path:
    """Byte pairs after normalisation, no BOS, the class that transformers has for it."""
    backend = train_byte_level(QWEN_PATTERN, CHATML)
    backend.normalizer = normalizers.NFC()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    named = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    ids = [backend.token_to_id(text) for text in ("<|im_end|>", "<|endoftext|>")]
    return write(folder, backend, {**named, "tokenizer_class": "Qwen2Tokenizer"}, {"eos_token_id": ids})


def llama2(folder: Path) -> Path:
    """A SentencePiece model that transformers converted, with the model beside it: a space before the first text."""
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "vocab_size": 431}
    folder.mkdir(exist_ok=True)
    train_model(folder / "tokenizer.model", byte_fallback=True, lines=CORPUS, **options)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True, "legacy": False}))
    LlamaTokenizer.from_pretrained(folder, add_bos_token=True).save_pretrained(folder)
    return folder


def llama2_legacy(folder: Path) -> Path:
    """The same as files of 2023 have it: a normaliser puts a space before every text, those after a token too."""
    backend = tokenizers.Tokenizer.from_file(str(llama2(folder) / "tokenizer.json"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    (folder / "tokenizer.model").unlink()
    return write(folder, backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def gemma(folder: Path) -> Path:
    """Byte pairs with bytes as the last resort, spaces as letters, and no space before a text."""
    backend = tokenizers.Tokenizer.from_file(str(llama2(folder) / "tokenizer.json"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("  ", normalized=False)])
    backend.add_special_tokens(["<start_of_turn>", "<end_of_turn>"])
    (folder / "tokenizer.model").unlink()
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return write(folder, backend, named, {"eos_token_id": [2, backend.token_to_id("<end_of_turn>")]})


def unigram(folder: Path) -> Path:
    """Pieces by likelihood, with text that no piece spells, as T5's and XLM-R's."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<unk>", "<pad>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=211, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    eos = backend.token_to_id("</s>")
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", eos)])
    return write(folder, backend, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"})


KINDS: dict[str, Callable[[Path], Path]] = {
    make.__name__: make for make in (llama3, qwen, llama2, llama2_legacy, gemma, unigram)
}


def write(
    folder: Path, backend: tokenizers.Tokenizer, config: dict[str, Any], generation: dict[str, Any] | None = None
) -> Path:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def splits(text: str) -> Iterator[tuple[str, str]]:
    """Some ways to cut a text in two."""
    for cut in {0, 1, len(text) // 2, len(text)}:
        yield text[:cut], text[cut:]
