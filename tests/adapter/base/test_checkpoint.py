"""Checkpoints of both formats load to the same decoder, within their memory bound, or fail naming file and key."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers import LlamaConfig as HFConfig

from adapter.adaption import AdaptionConfig
from adapter.base.checkpoint import load_decoder, open_checkpoint, save_decoder
from adapter.decoder import Decoder
from adapter.decoder_config import DecoderConfig
from adapter.errors import CheckpointError
from adapter.image_projection import ImageProjectionConfig
from adapter.rope import Llama3Scaling
from adapter.tokenizers.load import load_tokenizer

VOCAB, DIM, HEADS, KV_HEADS, HIDDEN, LAYERS = 31, 24, 4, 2, 34, 3
IDS = torch.tensor([[1, 7, 30, 2, 19, 11, 4, 23, 8, 5, 13]])
LLAMA3_ROPE = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def hf_model(*, seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": DIM, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 64,
        "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    model = LlamaForCausalLM(HFConfig(**{**sizes, **changes})).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return model


def hf_logits(model: LlamaForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def our_logits(path: Path) -> Tensor:
    with torch.no_grad():
        return load_decoder(path)(IDS)


def meta_tensors(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """The model's weights as Meta would name and order them: rows of q and k in adjacent pairs."""
    config, state = model.config, model.state_dict()

    def pairs(weight: Tensor, heads: int) -> Tensor:
        return torch.stack([h for w in weight.chunk(heads) for pair in zip(*w.chunk(2), strict=True) for h in pair])

    out = {"tok_embeddings.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    if not config.tie_word_embeddings:
        out["output.weight"] = state["lm_head.weight"]
    for i in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        out[ours + "attention.wq.weight"] = pairs(state[theirs + "self_attn.q_proj.weight"], config.num_attention_heads)
        out[ours + "attention.wk.weight"] = pairs(state[theirs + "self_attn.k_proj.weight"], config.num_key_value_heads)
        for name, key in {
            "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj",
            "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
        }.items():  # fmt: skip
            out[f"{ours}{name}.weight"] = state[f"{theirs}{key}.weight"]
    return out


def meta_params(model: LlamaForCausalLM, **changes) -> dict:
    config = model.config
    params = {"dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads,
              "n_kv_heads": config.num_key_value_heads, "multiple_of": 256, "norm_eps": config.rms_norm_eps,
              "vocab_size": -1}  # fmt: skip
    return {**params, **changes}


def write_meta(folder: Path, model: LlamaForCausalLM, *, shards: int = 1, embed_dim: int = 1, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(meta_params(model, **changes)))
    dims = {"wo": 1, "w2": 1, "tok_embeddings": embed_dim, "attention_norm": None, "ffn_norm": None, "norm": None}
    for rank in range(shards):
        part = {"rope.freqs": torch.ones(3)}
        for key, tensor in meta_tensors(model).items():
            dim = dims.get(key.split(".")[-2], 0)
            part[key] = tensor.clone() if dim is None else tensor.chunk(shards, dim)[rank].clone()
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    return folder


def write_hf(folder: Path, model: LlamaForCausalLM, **options) -> Path:
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return hf_model()


@pytest.mark.parametrize("changes", [
    {},
    {"num_key_value_heads": HEADS, "rms_norm_eps": 1e-3},
    {"tie_word_embeddings": True},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 321.0}},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3_ROPE}},
])  # fmt: skip
def test_hf_folder_equals_transformers_and_survives_saving(tmp_path: Path, changes: dict) -> None:
    model = hf_model(**changes)
    path = write_hf(tmp_path / "theirs", model)
    ours = load_decoder(path)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    torch.testing.assert_close(our_logits(path), hf_logits(model), rtol=0, atol=1e-4)

    save_decoder(ours, tmp_path / "ours")
    assert sorted(os.listdir(tmp_path / "ours")) == ["config.json", "model.safetensors"]
    again = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(hf_logits(again), hf_logits(model), rtol=0, atol=0)
    assert open_checkpoint(tmp_path / "ours").config == ours.config
    assert open_checkpoint(tmp_path / "ours").fingerprint() == open_checkpoint(path).fingerprint()


def test_hf_sharded_and_pickled_forms_are_one_model(tmp_path: Path, model: LlamaForCausalLM) -> None:
    single = write_hf(tmp_path / "single", model)
    sharded = write_hf(tmp_path / "sharded", model, max_shard_size="6KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    pickled, both = tmp_path / "pickled", tmp_path / "both"
    for folder in (pickled, both):
        folder.mkdir()
        (folder / "config.json").write_text((single / "config.json").read_text())
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)  # old files hold it
    torch.save(state, pickled / "pytorch_model.bin")
    where = {key: f"pytorch_model-0000{i % 2}.bin" for i, key in enumerate(state)}
    for name in set(where.values()):
        torch.save({key: state[key] for key in state if where[key] == name}, both / name)
    (both / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    for folder in (single, sharded, pickled, both):
        torch.testing.assert_close(our_logits(folder), hf_logits(model), rtol=0, atol=1e-4)
    assert len({open_checkpoint(folder).fingerprint() for folder in (single, sharded, pickled, both)}) == 1


def test_older_config_spellings(tmp_path: Path, model: LlamaForCausalLM) -> None:
    path = write_hf(tmp_path, model)
    config = json.loads((path / "config.json").read_text())
    for key in ("rope_parameters", "head_dim"):
        del config[key]
    config |= {"rope_theta": 77.0, "rope_scaling": {"type": "llama3", **LLAMA3_ROPE}}
    (path / "config.json").write_text(json.dumps(config))
    ours = open_checkpoint(path).config
    assert ours.rope_theta == 77.0
    assert ours.rope_scaling == Llama3Scaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=16)


@pytest.mark.parametrize(("shards", "embed_dim"), [(1, 1), (2, 1), (2, 0)])
@pytest.mark.parametrize("tied", [False, True])
def test_meta_shards_merge_to_the_hf_model(tmp_path: Path, shards: int, embed_dim: int, tied: bool) -> None:
    changes = {"vocab_size": 34} if shards > 1 else {}  # shards are even
    model = hf_model(tie_word_embeddings=tied, **changes)
    path = write_meta(tmp_path / "meta", model, shards=shards, embed_dim=embed_dim)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.config.vocab_size, checkpoint.config.hidden_dim) == (model.config.vocab_size, HIDDEN)
    assert checkpoint.config.tied_head == tied
    torch.testing.assert_close(our_logits(path), hf_logits(model), rtol=0, atol=1e-4)
    assert checkpoint.fingerprint() == open_checkpoint(write_hf(tmp_path / "hf", model)).fingerprint()


def test_four_shards_of_many_heads(tmp_path: Path) -> None:
    model = hf_model(num_attention_heads=12, num_key_value_heads=4, hidden_size=48, intermediate_size=68, vocab_size=44)
    path = write_meta(tmp_path / "meta", model, shards=4)
    torch.testing.assert_close(our_logits(path), hf_logits(model), rtol=0, atol=1e-4)
    assert open_checkpoint(path).fingerprint() == open_checkpoint(write_hf(tmp_path / "hf", model)).fingerprint()


def test_meta_params_reach_the_config(tmp_path: Path, model: LlamaForCausalLM) -> None:
    path = write_meta(tmp_path, model, rope_theta=5e5, use_scaled_rope=True, max_seq_len=99, norm_eps=1e-4)
    assert open_checkpoint(path).config == DecoderConfig(
        dim=DIM, n_layers=LAYERS, n_heads=HEADS, n_kv_heads=KV_HEADS, hidden_dim=HIDDEN, vocab_size=VOCAB,
        norm_eps=1e-4, rope_theta=5e5, rope_scaling=Llama3Scaling(factor=8.0), max_seq_len=99,
    )  # fmt: skip


def test_tensors_stream_under_the_decoders_names(tmp_path: Path, model: LlamaForCausalLM) -> None:
    checkpoint = open_checkpoint(write_meta(tmp_path, model))
    loaded = dict(load_decoder(checkpoint).named_parameters())
    for _ in range(2):  # pages given back come again
        streamed = dict(checkpoint.tensors(lambda name: torch.float32))
        assert streamed.keys() == loaded.keys()
        assert all(torch.equal(streamed[name], loaded[name]) for name in loaded)


def test_fingerprint_tells_bases_apart_but_not_precisions(tmp_path: Path, model: LlamaForCausalLM) -> None:
    half = hf_model().to(torch.bfloat16)
    paths = {
        "half": write_hf(tmp_path / "half", half),
        "whole": write_hf(tmp_path / "whole", hf_model().to(torch.bfloat16).float()),
        "other": write_hf(tmp_path / "other", hf_model(seed=1)),
        "model": write_hf(tmp_path / "model", model),
    }
    prints = {name: open_checkpoint(path).fingerprint() for name, path in paths.items()}
    assert prints["half"] == prints["whole"]
    assert len(set(prints.values())) == 3
    assert load_decoder(paths["half"], dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16


def test_tokenizer_is_found_in_the_folder_or_beside_it(tmp_path: Path, model: LlamaForCausalLM) -> None:
    path = write_meta(tmp_path / "7B", model)
    assert open_checkpoint(path).tokenizer_path is None
    (tmp_path / "tokenizer.model").touch()
    assert open_checkpoint(path).tokenizer_path == tmp_path / "tokenizer.model"
    (path / "tokenizer.json").touch()
    assert open_checkpoint(path).tokenizer_path == path, "it has one of its own"
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.model").touch()
    assert open_checkpoint(path).tokenizer_path == path


def test_a_tokenizer_beside_a_hugging_face_folder_is_a_neighbours(tmp_path: Path, model: LlamaForCausalLM) -> None:
    path = write_hf(tmp_path / "model", model)
    (tmp_path / "tokenizer.model").touch()
    assert open_checkpoint(path).tokenizer_path is None
    write_meta(path, model)  # both formats: it is read as Hugging Face's
    assert open_checkpoint(path).tokenizer_path is None
    (path / "tokenizer.model").touch()
    assert open_checkpoint(path).tokenizer_path == path


def test_a_tied_flag_with_a_head_of_its_own_is_read_as_transformers_reads_it(
    tmp_path: Path, model: LlamaForCausalLM
) -> None:
    path = write_hf(tmp_path, model)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert not open_checkpoint(path).config.tied_head
    theirs = LlamaForCausalLM.from_pretrained(path)
    torch.testing.assert_close(our_logits(path), hf_logits(theirs), rtol=0, atol=1e-4)
    torch.testing.assert_close(our_logits(path), hf_logits(model), rtol=0, atol=1e-4)
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path / "model.safetensors")
    assert open_checkpoint(path).config.tied_head, "a head that repeats the embedding is a tied one"
    torch.testing.assert_close(our_logits(path), hf_logits(LlamaForCausalLM.from_pretrained(path)), rtol=0, atol=1e-4)


def test_fingerprints_of_llama_are_those_of_earlier_releases(tmp_path: Path) -> None:
    """Adapters are stored with them."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_ROPE}
    model = hf_model(hidden_size=12, num_attention_heads=3, num_key_value_heads=1, intermediate_size=7, vocab_size=5,
                     num_hidden_layers=2, rope_parameters=rope)  # fmt: skip
    with torch.no_grad():
        for place, (_, parameter) in enumerate(sorted(model.named_parameters())):
            parameter.copy_((torch.arange(parameter.numel()) / 7 + place).view_as(parameter))
    expected = "211bc6d1a75c5493d42e8f34162456a816e80fbce74f760b5cf243e02886531b"
    assert open_checkpoint(write_hf(tmp_path, model)).fingerprint() == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named_at_load(tmp_path: Path, value: float) -> None:
    broken = hf_model()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[2, 3] = value
    word = "NaN" if value != value else "infinity"
    for path in (write_hf(tmp_path / "hf", broken), write_meta(tmp_path / "meta", broken)):
        checkpoint = open_checkpoint(path)
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(CheckpointError, match=rf"{path}.*layers\.1\.feed_forward\.w3\.weight holds {word}"):
                load_decoder(checkpoint, dtype=dtype)
        with pytest.raises(CheckpointError, match=rf"{path}.*layers\.1\.feed_forward\.w3\.weight holds {word}"):
            list(checkpoint.tensors(lambda name: torch.float32))


def test_a_weight_too_large_for_its_precision_is_named_at_load(tmp_path: Path) -> None:
    large = hf_model()
    with torch.no_grad():
        large.model.norm.weight[0] = 1e6
    checkpoint = open_checkpoint(write_hf(tmp_path, large))
    load_decoder(checkpoint, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"norm\.weight holds infinity \(in float16\)"):
        load_decoder(checkpoint, dtype=torch.float16)


MEMORY = """
import os, sys, torch
from adapter.base.checkpoint import load_decoder

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))

*warm, hf, meta = sys.argv[1:]
for path in hf, meta:
    if child := os.fork():  # a process each, so that none lives on memory that another freed
        os.waitpid(child, 0)
        continue
    for small in warm:  # what loading imports and touches once; libraries' pages are mapped anew after a fork
        load_decoder(small)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    sizes = [p.nbytes for p in load_decoder(path).parameters()]
    print((status("VmHWM") - before) / (sum(sizes) + max(sizes)), flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc to measure memory")
def test_peak_memory_is_the_model_and_one_tensor(tmp_path: Path, model: LlamaForCausalLM) -> None:
    """All resident memory counts, mapped pages of the file too; the bound is model + largest tensor + 10%."""
    with torch.device("meta"):
        big = hf_model(hidden_size=512, intermediate_size=1366, num_hidden_layers=12, num_attention_heads=8,
                       num_key_value_heads=8, vocab_size=3002)  # fmt: skip
    big.to_empty(device="cpu")
    for parameter in big.parameters():
        torch.nn.init.ones_(parameter)  # the memory that it got may hold NaN
    assert 150e6 < sum(p.nbytes for p in big.parameters()) < 300e6
    paths = [
        write_meta(tmp_path / "small_meta", model),
        write_hf(tmp_path / "small_hf", model),
        write_hf(tmp_path / "hf", big),
        write_meta(tmp_path / "meta", big.bfloat16(), shards=2),
    ]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, paths)],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # threads would not survive the fork
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    ratios = [float(line) for line in done.stdout.split()]
    assert len(ratios) == 2, done.stderr
    assert all(0.8 < ratio < 1.1 for ratio in ratios), ratios


def test_a_failed_save_leaves_the_old_file(
    tmp_path: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = load_decoder(write_hf(tmp_path, model))
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(tensors: dict, path: Path, **_) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("adapter.base.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_decoder(ours, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_a_base_is_saved_without_its_adapter(tmp_path: Path, model: LlamaForCausalLM) -> None:
    ours = load_decoder(write_hf(tmp_path, model))
    save_decoder(ours, tmp_path / "bare")
    ours.add_adapter(AdaptionConfig(n_layers=2, prompt_length=3, vision=ImageProjectionConfig(widths=(5,))))
    save_decoder(ours, tmp_path / "adapted")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "adapted" / name).read_bytes() == (tmp_path / "bare" / name).read_bytes()


def text_loss(model: Decoder, ids: Tensor) -> float:
    """Nats per token."""
    with torch.no_grad():
        return F.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).item()


def test_a_trained_checkpoint_predicts_the_text_it_was_trained_on(trained_llama: Path) -> None:
    checkpoint = open_checkpoint(trained_llama)
    assert checkpoint.tokenizer_path is not None
    tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    tokenizer.check_fits(checkpoint.config.vocab_size)
    text = "The red cat sat on the hill. The old dog ran over the mat. The shy bird slept under the house."
    ids = torch.tensor([tokenizer.encode(text, bos=True, eos=False)])
    assert text_loss(load_decoder(checkpoint), ids) < 1


@pytest.mark.slow
def test_a_pretrained_llama_equals_transformers_and_itself_in_metas_format(smollm2: Path, tmp_path: Path) -> None:
    tokenizer, theirs = AutoTokenizer.from_pretrained(smollm2), LlamaForCausalLM.from_pretrained(smollm2).eval()
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    texts = (
        "The capital of France is Paris. Water boils at a hundred degrees.",
        tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True),
    )
    given = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    with torch.no_grad():
        expected = [theirs(ids).logits for ids in given]
    meta = write_meta(tmp_path / "meta", theirs, rope_theta=theirs.config.rope_parameters["rope_theta"])
    for folder in (smollm2, meta):
        ours = load_decoder(folder)
        with torch.no_grad():
            torch.testing.assert_close([ours(ids) for ids in given], expected, rtol=0, atol=1e-4)
        assert text_loss(ours, given[0]) < 4, "nats per token of plain English"
