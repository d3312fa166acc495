"""Checkpoints that cannot be used are refused at opening, by an error that names the file and the key."""

import argparse
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from adapter.base.checkpoint import open_checkpoint
from adapter.errors import CheckpointError
from tests.adapter.base.test_checkpoint import DIM, hf_logits, hf_model, our_logits, write_hf, write_meta


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return hf_model()


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_pth(path: Path, key: str, value: Tensor | None) -> None:
    state = torch.load(path, weights_only=True)
    state.pop(key, None)
    if value is not None:
        state[key] = value
    torch.save(state, path)


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": None}, "model_type is None; supported are llama, mistral,"),
    ({"model_type": "mamba"}, "model_type is 'mamba'; supported are llama, mistral,"),
    ({"model_type": "qwen2_moe", "num_experts": 8}, r"'qwen2_moe', a mixture of experts \(num_experts is 8\): only"),
    ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
     "'gemma3', a multimodal model around a text model of type 'gemma3_text'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"attention_bias": True}, r"q_proj\.bias, .* missing"),
    ({"mlp_bias": True}, r"gate_proj\.bias, .* missing"),
    ({"quantization_config": {"quant_method": "gptq"}}, r"the weights are quantized \(quant_method 'gptq'\): give"),
    ({"head_dim": 8}, r"q_proj\.weight has shape \(24, 24\), the configuration wants \(32, 24\)"),
    ({"head_dim": 7}, "4 heads of even width, not 7"),
    ({"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}, r"rope_type is 'mrope'.*'default', 'linear'"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention: this family has one RoPE for all"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "must give factor"),
    ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "3 factors, got 1"),
    ({"rope_parameters": None, "partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
    ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types has 1 entries for 3 layers"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, "window's width is not stated"),
    ({"model_type": "qwen2", "layer_types": ["linear_attention"] * 3}, r"layer_types\.0 is 'linear_attention'"),
    ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers has 1 entries for 3 layers"),
    ({"model_type": "gemma", "hidden_act": "silu"}, "hidden_act is 'silu'"),
    ({"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
     "only full attention may be scaled"),
    ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "must give factor"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
     "must give original_max_position_embeddings as a positive number"),
    ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "must give long_factor as numbers"),
    ({"hidden_size": None}, "hidden_size is None"),
    ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"num_hidden_layers": 31}, "30 tensors cannot be a model of 31 layers"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it should be less than or equal to 10000"),
    ({"model_type": "mistral", "num_hidden_layers": 2**31 - 1}, "num_hidden_layers is 2147483647"),
    ({"hidden_size": 10**30}, "hidden_size is 1000000"),
    ({"num_attention_heads": 5, "head_dim": None}, "head_dim|heads"),
    ({"num_key_value_heads": 3}, "cannot share"),
    ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
    ({"vocab_size": 32}, r"model\.safetensors: model\.embed_tokens\.weight has shape \(31, 24\).*\(32, 24\)"),
    ({"num_hidden_layers": 2}, r"model\.layers\.2\.\S+.* and 6 more unexpected"),
    ({"num_hidden_layers": 4}, r"model\.layers\.3\.\S+.* and 6 more missing"),
])  # fmt: skip
def test_hf_configs_that_are_refused(tmp_path: Path, model: LlamaForCausalLM, changes: dict, message: str) -> None:
    path = write_hf(tmp_path, model)
    edit_json(path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(tmp_path) in str(caught.value)


def test_hf_files_that_are_refused(tmp_path: Path, model: LlamaForCausalLM) -> None:
    path = write_hf(tmp_path, model)
    file = path / "model.safetensors"
    whole, state = file.read_bytes(), load_file(file)
    file.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*truncated"):
        open_checkpoint(path)
    save_file({**state, "model.norm.bias": torch.ones(3)}, file)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: model\.norm\.bias unexpected"):
        open_checkpoint(path)
    save_file({**state, "model.norm.weight": torch.ones(DIM, dtype=torch.int8)}, file)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is torch\.int8"):
        open_checkpoint(path)
    save_file({key: tensor for key, tensor in state.items() if key != "lm_head.weight"}, file)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: lm_head\.weight missing"):
        open_checkpoint(path)
    edit_json(path / "config.json", tie_word_embeddings=True)
    assert open_checkpoint(path).config.tied_head
    file.unlink()
    with pytest.raises(CheckpointError, match="no weights: expected"):
        open_checkpoint(path)
    (path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not readable JSON"):
        open_checkpoint(path)


def test_hf_indexes_that_are_refused(tmp_path: Path, model: LlamaForCausalLM) -> None:
    path = write_hf(tmp_path, model, max_shard_size="6KB")
    index = path / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    shard = path / good["model.norm.weight"]
    edit_json(index, weight_map={**good, "model.extra.weight": shard.name})
    with pytest.raises(CheckpointError, match=rf"{shard.name}: model\.extra\.weight is missing"):
        open_checkpoint(path)
    edit_json(index, weight_map={**good, "model.norm.weight": "../elsewhere.safetensors"})
    with pytest.raises(CheckpointError, match="not the name of a file in this folder"):
        open_checkpoint(path)
    edit_json(index, weight_map=[])
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map"):
        open_checkpoint(path)
    edit_json(index, weight_map=good)
    twice = load_file(shard)
    other = path / next(name for name in good.values() if name != shard.name)
    save_file({**load_file(other), **twice}, other)
    with pytest.raises(CheckpointError, match="is also in"):
        open_checkpoint(path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: no such file"):
        open_checkpoint(path)


def test_meta_files_that_are_refused(tmp_path: Path) -> None:
    path = write_meta(tmp_path, hf_model(vocab_size=34), shards=2)
    first, second = path / "consolidated.00.pth", path / "consolidated.01.pth"
    whole = second.read_bytes()

    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth: not a readable PyTorch file, truncated"):
        open_checkpoint(path)
    second.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth"):
        open_checkpoint(path)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: .* has shape .* the configuration wants"):
        open_checkpoint(path)
    (path / "consolidated.02.pth").write_bytes(whole)
    with pytest.raises(CheckpointError, match="without a gap"):
        open_checkpoint(path)
    (path / "consolidated.02.pth").rename(second)

    edit_pth(second, "layers.1.ffn_norm.weight", None)
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth: layers\.1\.ffn_norm\.weight is not in both"):
        open_checkpoint(path)
    edit_pth(first, "layers.1.ffn_norm.weight", None)
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn_norm\.weight missing"):
        open_checkpoint(path)
    for file in (first, second):
        edit_pth(file, "layers.0.feed_forward.w1.weight", None)
    with pytest.raises(CheckpointError, match=r"00\.pth: layers\.0\.feed_forward\.w1\.weight is missing"):
        open_checkpoint(path)
    edit_json(path / "params.json", dim=None)
    with pytest.raises(CheckpointError, match=r"params\.json: dim is None"):
        open_checkpoint(path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB_FOLDER"],)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_never_runs_code(
    tmp_path: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    exploded = tmp_path / "exploded"
    monkeypatch.setenv("BOMB_FOLDER", str(exploded))
    path = write_meta(tmp_path / "meta", model)
    file = path / "consolidated.00.pth"
    torch.save({"norm.weight": Bomb()}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: refused.*can run code"):
        open_checkpoint(path)
    assert not exploded.exists()


def test_contents_that_are_no_tensors_by_name(tmp_path: Path, model: LlamaForCausalLM) -> None:
    path = write_meta(tmp_path, model)
    file = path / "consolidated.00.pth"
    state = torch.load(file, weights_only=True)
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match="holds a list"):
        open_checkpoint(path)
    torch.save({"step": 3}, file)
    with pytest.raises(CheckpointError, match="'step' is a int"):
        open_checkpoint(path)
    torch.save({"norm.weight": torch.ones(3, device="meta")}, file)
    with pytest.raises(CheckpointError, match=r"norm\.weight is not a plain dense tensor"):
        open_checkpoint(path)
    torch.save(state, file, _use_new_zipfile_serialization=False)  # of before PyTorch 1.6: no map, but read
    torch.testing.assert_close(our_logits(path), hf_logits(model), rtol=0, atol=1e-4)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent: neither a GGUF file nor a folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"neither config\.json"):
        open_checkpoint(tmp_path)


def test_git_lfs_pointers_and_pages_in_place_of_weights(tmp_path: Path, model: LlamaForCausalLM) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"
    hf, meta = write_hf(tmp_path / "hf", model), write_meta(tmp_path / "meta", model)
    for path, name in ((hf, "model.safetensors"), (meta, "consolidated.00.pth"), (hf, "config.json")):
        (path / name).write_text(pointer)
        with pytest.raises(CheckpointError, match=rf"{name}: a Git LFS pointer .* `git lfs pull`"):
            open_checkpoint(path)
        (path / name).write_text("<!DOCTYPE html>\n<html>")
        with pytest.raises(CheckpointError, match=rf"{name}: an HTML page"):
            open_checkpoint(path)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_cut_files_of_pytorchs_format_are_refused(tmp_path: Path, model: LlamaForCausalLM, keep: float) -> None:
    path = write_hf(tmp_path, model)
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    for legacy in (False, True):
        file = path / "pytorch_model.bin"
        torch.save(state, file, _use_new_zipfile_serialization=not legacy)
        whole = file.read_bytes()
        file.write_bytes(whole[: int(len(whole) * keep) if 0 < keep < 1 else int(keep)])
        with pytest.raises(
            CheckpointError, match=r"pytorch_model\.bin: (not a readable PyTorch file|refused|an empty file)"
        ):
            open_checkpoint(path)


@pytest.mark.parametrize("content", [b"junk", b"\x80\x02junk", b"hello world" * 100, b"PK\3\4" + bytes(500), bytes(99)])
def test_junk_in_place_of_a_pytorch_file_is_refused(tmp_path: Path, model: LlamaForCausalLM, content: bytes) -> None:
    path = write_meta(tmp_path, model)
    (path / "consolidated.00.pth").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"consolidated\.00\.pth: (not a readable PyTorch file|refused|text, not tensors)"
    ):
        open_checkpoint(path)


def test_a_pickle_of_objects_is_refused_with_what_it_holds(tmp_path: Path, model: LlamaForCausalLM) -> None:
    path = write_meta(tmp_path, model)
    torch.save({"args": argparse.Namespace(lr=1)}, path / "consolidated.00.pth")
    with pytest.raises(
        CheckpointError, match=r"refused, because its pickle holds argparse\.Namespace, .*safetensors\.$"
    ):
        open_checkpoint(path)
