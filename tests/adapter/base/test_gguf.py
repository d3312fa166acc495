"""GGUF files load to the model that they were made of, dequantised piece by piece, or fail naming file and key."""

import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from adapter.base import gguf_source
from adapter.base.checkpoint import load_decoder, open_checkpoint
from adapter.base.gguf_checkpoint import ARCHITECTURES
from adapter.errors import CheckpointError
from adapter.rope import LinearScaling, Llama3Scaling, LongRopeScaling, YarnScaling
from tests.adapter.base.gguf_files import write_gguf
from tests.adapter.models import tokens

SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 97, "initializer_range": 0.15, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-5,
}  # fmt: skip
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "initializer_range": 0.05}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 18}, {}),
    "tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}, {"general.alignment": 256}),
    "mistral": ("mistral", {"head_dim": 18, "sliding_window": None}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {"head_dim": 18}, {}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}, {}),
    "gemma": ("gemma", {"head_dim": 18}, {}),
    "gemma2": (
        "gemma2",
        {"head_dim": 18, "query_pre_attn_scalar": 18, "sliding_window": 11, "attn_logit_softcapping": 1.5,
         "final_logit_softcapping": 2.5},
        {"ARCH.attention.sliding_window": 11, "ARCH.attn_logit_softcapping": 1.5,
         "ARCH.final_logit_softcapping": 2.5},
    ),
    "gemma2 of its largest size, whose scores are scaled otherwise": (
        "gemma2",
        {"head_dim": 18, "query_pre_attn_scalar": SIZES["hidden_size"] // SIZES["num_attention_heads"],
         "num_hidden_layers": 46, "sliding_window": 11},
        {"ARCH.attention.sliding_window": 11, "ARCH.attn_logit_softcapping": 50.0,
         "ARCH.final_logit_softcapping": 30.0},
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 18, "query_pre_attn_scalar": 18, "sliding_window": 11, "num_hidden_layers": 7,
         "rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        {"ARCH.attention.sliding_window": 11, "ARCH.rope.scaling.type": "linear", "ARCH.rope.scaling.factor": 8.0},
    ),
}  # fmt: skip


def build(model_type: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, float("norm" in name and "gemma" not in model_type), 0.2)
    return model


@torch.no_grad()
def check_equal(path: Path, model: PreTrainedModel) -> None:
    ids = tokens(3, 43)
    torch.testing.assert_close(load_decoder(path)(ids), model(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_equals_the_model_that_the_file_was_made_of(name: str, tmp_path: Path) -> None:
    model_type, changes, metadata = MODELS[name]
    model = build(model_type, **changes)
    path = write_gguf(tmp_path / "model.gguf", model, **metadata)
    check_equal(path, model)
    model.save_pretrained(tmp_path)
    folder, file = open_checkpoint(tmp_path), open_checkpoint(path)
    assert file.config.switches() == folder.config.switches()
    if "gemma" not in name:  # whose norms lose bits on the way
        assert file.fingerprint() == folder.fingerprint()


def test_every_architecture_is_tried() -> None:
    assert {architecture.model_type for architecture in ARCHITECTURES.values()} == {
        model_type for model_type, _, _ in MODELS.values() if model_type != "mistral"
    }


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1])
def test_every_storage_equals_transformers_reading_of_it(kind: Kind, tmp_path: Path) -> None:
    check_storage(tmp_path, kind)


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q6_K])
def test_storage_in_blocks_of_256_too(kind: Kind, tmp_path: Path) -> None:
    check_storage(tmp_path, kind, **WIDE)


def check_storage(folder: Path, kind: Kind, **changes: Any) -> None:
    model = build("llama", **changes)
    path = write_gguf(folder / "model.gguf", model, kind)
    check_equal(path, model)
    theirs = LlamaForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32)
    check_equal(path, theirs.eval())


def test_values_are_read_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    path = write_gguf(tmp_path / "model.gguf", model, Kind.Q8_0)
    sizes = []

    def counted(data, kind):
        values = dequantize(data, kind)
        sizes.append(values.size)
        return values

    dequantize = gguf.dequantize
    monkeypatch.setattr(gguf, "dequantize", counted)
    monkeypatch.setattr(gguf_source, "_CHUNK", 640)
    checkpoint = open_checkpoint(path)
    assert sum(sizes) < 100_000 / 10, "opening reads no value"
    sizes.clear()
    check_equal(path, model)
    assert max(sizes) <= 16 * 64  # a head of the queries
    sizes.clear()
    checkpoint.fingerprint()
    assert max(sizes) <= 96, "a row"
    half = load_decoder(checkpoint, dtype=torch.bfloat16)
    torch.testing.assert_close(half.output.weight, model.lm_head.weight.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_scaling_is_recognised_by_its_divisors(factor: float, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    model = build("llama", rope_parameters=rope)
    plain = 1.0 / 5e5 ** (torch.arange(0, 16, 2) / 16)
    path = write_gguf(tmp_path / "model.gguf", model, rope_freqs=plain / model.model.rotary_emb.inv_freq)
    assert open_checkpoint(path).config.rope_scaling == Llama3Scaling(factor=factor)
    check_equal(path, model)


def test_other_divisors_are_taken_as_they_are(tmp_path: Path) -> None:
    divisors = [1.0, 1.1, 1.3, 1.7, 1.9, 2.3, 2.9, 3.1]
    model = build("llama")
    model.model.rotary_emb.inv_freq /= torch.tensor(divisors)
    path = write_gguf(tmp_path / "model.gguf", model, rope_freqs=divisors)
    assert isinstance(open_checkpoint(path).config.rope_scaling, LongRopeScaling)
    check_equal(path, model)


@pytest.mark.parametrize(("kind", "scaling"), [("linear", LinearScaling), ("yarn", YarnScaling)])
def test_scalings_of_the_metadata(kind: str, scaling: type, tmp_path: Path) -> None:
    rope = {"rope_type": kind, "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 23}
    model = build("llama", rope_parameters=rope)
    metadata = {"type": kind, "factor": 4.0, "original_context_length": 23}
    path = write_gguf(tmp_path / "model.gguf", model, **{f"ARCH.rope.scaling.{k}": v for k, v in metadata.items()})
    assert isinstance(open_checkpoint(path).config.rope_scaling, scaling)
    check_equal(path, model)


def test_a_model_in_several_files(tmp_path: Path) -> None:
    model = build("llama")
    first = write_gguf(tmp_path / "model.gguf", model, Kind.Q8_0, shards=7)
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) > 3
    assert first == files[0]
    check_equal(first, model)
    check_equal(tmp_path, model)  # a folder that holds one model
    with pytest.raises(CheckpointError, match=r"00002-of-\d+\.gguf: a later part of a model; give the first"):
        open_checkpoint(files[1])
    files[1].unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-\d+\.gguf: missing; the model is split into"):
        open_checkpoint(first)
    first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"renamed\.gguf: one of \d+ parts, whose names must end in"):
        open_checkpoint(tmp_path / "renamed.gguf")


def test_a_folder_with_two_models_asks_which(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"holds 2 models: give one of the files a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"ARCH.expert_count": 8}, r"a mixture of 8 experts; only dense models"),
        ({"ARCH.rope.dimension_count": 8}, r"llama\.rope\.dimension_count is 8; it must be a head's width, 16"),
        ({"ARCH.rope.scaling.type": "longrope"}, r"rope_scaling is .*longrope"),
        ({"ARCH.rope.scaling.type": "ntk", "ARCH.rope.scaling.factor": 2.0}, r"rope_scaling\.rope_type is 'ntk'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", build("llama"), **metadata)
    with pytest.raises(CheckpointError, match=rf"model\.gguf: {message}"):
        open_checkpoint(path)


def test_an_unknown_architecture_is_refused_before_its_tensors_are_looked_at(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"general\.architecture is 'mamba'; supported are llama, qwen2, "):
        open_checkpoint(tmp_path / "model.gguf")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", build("llama"), Kind.Q8_0)
    whole = path.read_bytes()
    damage = {
        "it ends within its header": whole[:60],
        "version 7": whole[:4] + struct.pack("<I", 7) + whole[8:],
        "truncated or corrupt": whole[:16] + struct.pack("<Q", 1 << 40) + whole[24:],
        "truncated: .* lies past its end; download it again": whole[:-100],
        r"metadata lacks llama\.block_count": whole.replace(b"llama.block_count", b"llama.block_coumt"),
        "output_norm.weight missing; output_morm.weight unexpected": whole.replace(b"output_norm", b"output_morm"),
        "has shape": whole.replace(struct.pack("<IQQ", 2, 64, 96), struct.pack("<IQQ", 2, 96, 64)),
    }
    for message, content in damage.items():
        assert content != whole, message
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"model\.gguf: .*{message}"):
            open_checkpoint(path)
    place = whole.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
    path.write_bytes(whole[:place] + struct.pack("<I", 2_000) + whole[place + 4 :])
    with pytest.raises(CheckpointError, match=r"output_norm\.weight is stored in ggml's type 2000, which"):
        open_checkpoint(path)


def test_a_value_that_is_no_number_is_named(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight[5] = float("nan")
    path = write_gguf(tmp_path / "model.gguf", model)
    with pytest.raises(CheckpointError, match=r"model\.gguf: norm\.weight holds NaN"):
        load_decoder(path)


@pytest.mark.slow
@torch.no_grad()
def test_a_real_file_equals_transformers_reading_of_it(smollm2_gguf: Path, smollm2: Path) -> None:
    ours, ids = load_decoder(smollm2_gguf), tokens(2, 43)
    assert torch.equal(ours(ids), LlamaForCausalLM.from_pretrained(smollm2).eval()(ids).logits)
    assert open_checkpoint(smollm2_gguf).fingerprint() == open_checkpoint(smollm2).fingerprint()
