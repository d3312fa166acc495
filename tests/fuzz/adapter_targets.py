"""The readers of `adapter/`: checkpoints, adapters, tokenizers, templates and records."""

import base64
import gzip
import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import sentencepiece
import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

from adapter.adapter_export import Format, export_adapter
from adapter.adapter_file import check_adapter_fits, extract_adapter
from adapter.adapter_formats import read_adapter
from adapter.adapter_header import read_header
from adapter.adaption import AdaptionConfig
from adapter.base.checkpoint import load_decoder, open_checkpoint, save_decoder
from adapter.base.tensor_names import gguf_key, hf_key
from adapter.decoder import Decoder
from adapter.decoder_config import DecoderConfig
from adapter.errors import RecordError
from adapter.methods.lora import LoraConfig
from adapter.records.encoding import encode_prompt, encode_record
from adapter.records.reader import checked_rows, recognise
from adapter.records.scienceqa import read_problem_records, read_problems
from adapter.templates import ALPACA, ChatTemplate, read_template, template_fields
from adapter.tokenizers.load import load_tokenizer
from adapter.tokenizers.tiktoken_ranks import byte_letters
from tests.fuzz.target import Target

SHAPE = DecoderConfig(dim=8, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=6, vocab_size=11, max_seq_len=16)
WORDS = ("the", "cat", "sat", "on", "a", "red", "mat", "and", "ran", "far", "below", "instruction", "response")
TEXT = "the cat sat on ### Response:\n<unk> été 🙂"
FORMATS: dict[str, Format] = {"peft": "peft", "litgpt": "litgpt"}
CHAT = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"


def decoder(shape: DecoderConfig = SHAPE) -> Decoder:
    model = Decoder(shape).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in model.base_parameters():
        parameter.normal_(generator=generator)
    return model


def write_hf(folder: Path) -> None:
    save_decoder(decoder(), folder)


def write_sharded(folder: Path) -> None:
    write_hf(folder)
    (folder / "model.safetensors").unlink()
    tensors = {hf_key(name): one.detach().contiguous() for name, one in decoder().base_parameters()}
    weight_map: dict[str, str] = {}
    for number, keys in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({key: tensors[key] for key in keys}, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_meta(folder: Path) -> None:
    params = {"dim": 8, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "norm_eps": 1e-5, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps({**params, "multiple_of": 4, "use_scaled_rope": True}))
    torch.save({name: one.detach() for name, one in decoder().base_parameters()}, folder / "consolidated.00.pth")


def write_gguf(folder: Path) -> None:
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for add, value in (
        (writer.add_block_count, 2), (writer.add_context_length, 16), (writer.add_embedding_length, 8),
        (writer.add_feed_forward_length, 6), (writer.add_head_count, 2), (writer.add_head_count_kv, 1),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_freq_base, 1e4),
    ):  # fmt: skip
        add(value)
    add_vocabulary(writer)
    writer.add_tensor("rope_freqs.weight", np.ones(2, np.float32))
    for name, one in decoder().base_parameters():
        writer.add_tensor(gguf_key(name), one.detach().numpy())
    close(writer)


def add_vocabulary(writer: gguf.GGUFWriter) -> None:
    pieces = ["<unk>", "<s>", "</s>", "▁", "▁the", "▁cat", "a", "b", "c", "d", "e"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(i) for i in range(len(pieces))])
    writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1, 1, 4, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT)


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf_bytes(folder: Path) -> None:
    """The metadata of a tokenizer of byte pairs alone."""
    letters = [*byte_letters(), "th", "the", "<|end|>"]
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(letters)
    writer.add_token_types([1] * 258 + [3])
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(258)
    close(writer)


def read_checkpoint(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    load_decoder(checkpoint)
    checkpoint.fingerprint()


def write_adapter(kind: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        model = decoder()
        model.add_adapter(
            LoraConfig(rank=2) if kind.startswith("lora") else AdaptionConfig(n_layers=1, prompt_length=3)
        )
        file = extract_adapter(model, base_fingerprint="0" * 64, tokenizer_sha256="1" * 64, template=ALPACA)
        if kind.endswith("own"):
            file.save(folder / "adapter.safetensors")
        else:
            export_adapter(file, folder / "adapter", FORMATS[kind.partition(" ")[2]], SHAPE)

    return write


def read_adapter_at(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        file = read_adapter(folder / name)
        if name.endswith(".safetensors"):
            read_header(folder / name)
        check_adapter_fits(file, SHAPE)

    return read


def write_v1(folder: Path) -> None:
    tensors: dict[str, Tensor] = {f"layers.{i}.attention.gate": torch.ones(1, 2, 1, 1) for i in range(2)}
    torch.save({**tensors, "adapter_query.weight": torch.ones(6, 8)}, folder / "adapter.pth")


def train_sentence_piece(path: Path) -> None:
    sentences = (" ".join(random.Random(i).choices(WORDS, k=9)) for i in range(60))
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=file, vocab_size=300, model_type="bpe", byte_fallback=True,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip


def write_sentence_piece(folder: Path) -> None:
    train_sentence_piece(folder / "tokenizer.model")
    added = {"3": {"content": "<|x|>", "special": True}}
    config = {"add_bos_token": True, "eos_token": {"content": "</s>"}, "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHAT, "legacy": False}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))


def write_tokenizer_json(folder: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=40, show_progress=False)
    backend.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": [{"name": "default", "template": CHAT}]}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "additional_special_tokens": ["<s>"]}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": 41}))


def write_ranks(folder: Path) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the"]
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (folder / "tokenizer.model").write_text("".join(lines))
    (folder / "params.json").write_text('{"use_scaled_rope": true}')


def read_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(TEXT, bos=True, eos=False)
    tokenizer.decode(ids)
    tokenizer.encode_rendered(TEXT)


RECORDS: tuple[dict[str, Any], ...] = (
    {"instruction": "Say it.", "input": "the cat", "output": "a cat"},
    {"instruction": "Say it.", "input": "", "output": "a cat", "image": "a.png"},
)
CHATS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"},
                  {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
                  {"role": "tool", "content": "1", "tool_call_id": "x"}, {"role": "assistant", "content": "Ho"}]},
    {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bird."}],
     "image": "b.png", "id": 3},
    {"prompt": "a", "completion": "b"}, {"text": "the cat"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                  {"role": "assistant", "content": "Ho", "weight": 0}], "tools": [{"type": "function"}]},
)  # fmt: skip


def write_records(name: str, rows: tuple[dict[str, Any], ...]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        train_sentence_piece(folder / "tokenizer.model")
        path = folder / name
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if name.endswith(".json"):
            path.write_text(json.dumps(list(rows)))
        elif name.endswith(".jsonl"):
            path.write_bytes(lines)
        elif name.endswith(".gz"):
            path.write_bytes(gzip.compress(lines))
        elif name.endswith(".zst"):
            with pa.CompressedOutputStream(str(path), "zstd") as stream:
                stream.write(lines)
        elif name.endswith(".csv"):
            path.write_text('instruction,input,output\n"Say, it","the\ncat","a ""cat"""\nb,,c\n')
        elif name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(list(rows)), path)
        else:
            table = pa.Table.from_pylist(list(rows))
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)

    return write


def read_records(path: Path) -> None:
    tokenizer = _tokenizer(path.with_name("tokenizer.model"))
    recognise(path)
    for answered in (True, False):
        for _, record, error in checked_rows(path, answered=answered):
            if error:
                continue
            for template in (ALPACA, ChatTemplate(source=CHAT)):
                try:
                    if answered:
                        encode_record(record, tokenizer, template=template, max_length=32)
                    else:
                        encode_prompt(record, tokenizer, template, window=64)
                except RecordError:
                    pass


_tokenizers: dict[Path, Any] = {}


def _tokenizer(path: Path) -> Any:
    if path not in _tokenizers:
        _tokenizers[path] = load_tokenizer(path)
    return _tokenizers[path]


def write_scienceqa(folder: Path) -> None:
    problem = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": "image.png",
               "grade": "grade3", "subject": "natural science", "split": "test"}  # fmt: skip
    (folder / "problems.json").write_text(json.dumps({"1": problem, "2": {**problem, "image": None}}))
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["1", "2"], "val": []}))


def read_scienceqa(folder: Path) -> None:
    list(read_problem_records(folder, "test"))
    for problem in read_problems(folder, "test"):
        problem.record()


def write_templates(folder: Path) -> None:
    (folder / "template.json").write_text(json.dumps(template_fields(ALPACA)))
    (folder / "template.jinja").write_text(
        CHAT + "{% generation %}{{ tools | tojson }}{% endgeneration %}{{ 3 * 'a' }}"
    )


def read_templates(folder: Path) -> None:
    prompt = read_template(folder / "template.json")
    assert not isinstance(prompt, ChatTemplate)
    prompt.render("a", "b")
    chat = read_template(folder / "template.jinja")
    assert isinstance(chat, ChatTemplate)
    with suppress(RecordError):
        chat.render([{"role": "user", "content": "Hi"}], special_tokens={"bos_token": "<s>"}, find=lambda text: True)


def records(name: str, file: str, rows: tuple[dict[str, Any], ...], share: int) -> Target:
    def read(folder: Path) -> None:
        read_records(folder / file)

    return Target(name=name, make=write_records(file, rows), read=read, damaged=(file,), share=share)


TARGETS = (
    Target(name="checkpoint-hf", make=write_hf, read=read_checkpoint),
    Target(name="checkpoint-hf-sharded", make=write_sharded, read=read_checkpoint),
    Target(name="checkpoint-meta", make=write_meta, read=read_checkpoint),
    Target(name="checkpoint-gguf", make=write_gguf, read=read_checkpoint),
    Target(name="adapter-own", make=write_adapter("prompts own"), read=read_adapter_at("adapter.safetensors"), share=4),
    Target(
        name="adapter-own-lora", make=write_adapter("lora own"), read=read_adapter_at("adapter.safetensors"), share=3
    ),
    Target(name="adapter-peft", make=write_adapter("prompts peft"), read=read_adapter_at("adapter"), share=3),
    Target(name="adapter-peft-lora", make=write_adapter("lora peft"), read=read_adapter_at("adapter"), share=3),
    Target(name="adapter-litgpt", make=write_adapter("prompts litgpt"), read=read_adapter_at("adapter"), share=1),
    Target(name="adapter-v1", make=write_v1, read=read_adapter_at("adapter.pth"), share=2),
    Target(name="tokenizer-sentencepiece", make=write_sentence_piece, read=read_tokenizer, share=3),
    Target(name="tokenizer-json", make=write_tokenizer_json, read=read_tokenizer, share=3),
    Target(name="tokenizer-tiktoken", make=write_ranks, read=read_tokenizer),
    Target(name="tokenizer-gguf", make=write_gguf, read=read_tokenizer, share=3),
    Target(name="tokenizer-gguf-bytes", make=write_gguf_bytes, read=read_tokenizer, share=2),
    Target(name="templates", make=write_templates, read=read_templates, share=3),
    records("records-json", "records.json", RECORDS, share=6),
    records("records-chat", "records.jsonl", CHATS, share=8),
    records("records-csv", "records.csv", RECORDS, share=3),
    records("records-parquet", "records.parquet", RECORDS, share=3),
    records("records-arrow", "records.arrow", RECORDS, share=2),
    records("records-gz", "records.jsonl.gz", RECORDS, share=2),
    records("records-zst", "records.jsonl.zst", RECORDS, share=2),
    Target(name="scienceqa", make=write_scienceqa, read=read_scienceqa, share=4),
)
