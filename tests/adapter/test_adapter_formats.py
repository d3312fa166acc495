"""Adapter files come back as they went, foreign ones compute what their own code computes, wrong ones are refused."""

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import AdaptionPromptConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM

from adapter.adapter_file import AdapterFile, apply_adapter, extract_adapter
from adapter.adapter_formats import read_adapter
from adapter.adapter_header import read_header
from adapter.adaption import AdaptionConfig, Gate
from adapter.base.checkpoint import load_decoder
from adapter.decoder import Decoder
from adapter.decoder_config import DecoderConfig
from adapter.errors import CheckpointError
from adapter.templates import ALPACA, ChatTemplate

VOCAB, DIM, HEADS, KV_HEADS, HIDDEN, LAYERS, L, K = 31, 24, 4, 2, 37, 5, 3, 7
CONFIG = DecoderConfig(
    dim=DIM, n_layers=LAYERS, n_heads=HEADS, n_kv_heads=KV_HEADS, hidden_dim=HIDDEN, vocab_size=VOCAB, max_seq_len=64
)
IDS = torch.tensor([[1, 7, 30, 2, 19, 11, 4, 23, 8, 5, 13]])


def base(config: DecoderConfig = CONFIG) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name), 0.3)
    return model.requires_grad_(False)


def adapted(gate: Gate = "tanh") -> Decoder:
    model = base()
    model.add_adapter(AdaptionConfig(n_layers=L, prompt_length=K, gate=gate), torch.Generator().manual_seed(1))
    with torch.no_grad():
        for adaption in model.adaptions:
            adaption.gate.uniform_(-0.9, 0.9)
    return model


def logits(model: Decoder) -> Tensor:
    with torch.no_grad():
        return model(IDS)


def same(left: AdapterFile, right: AdapterFile) -> bool:
    return torch.equal(left.prompt, right.prompt) and torch.equal(left.gate, right.gate)


def test_the_header_keeps_the_templates_of_the_training(tmp_path: Path) -> None:
    templates = {"template": ChatTemplate(source="{{ messages }}"), "format_templates": {"alpaca": ALPACA}}
    file, path = extract_adapter(adapted(), **templates), tmp_path / "a.safetensors"
    file.save(path)
    again = read_adapter(path)
    assert {"template": again.template, "format_templates": again.format_templates} == templates
    replace(file, template=None, format_templates={}).save(path)
    assert (read_adapter(path).template, read_adapter(path).format_templates) == (None, {})
    for broken in ('{"": 5}', '{"": {"kind": "chat"}}', "[]", "{"):
        tensors, header = {"prompt": file.prompt, "gate": file.gate}, safe_open(path, "pt").metadata()
        save_file(tensors, path, metadata={**header, "templates": broken})
        with pytest.raises(CheckpointError, match="its header is damaged"):
            read_adapter(path)


@pytest.mark.parametrize("gate", ["tanh", "identity"])
def test_own_form_round_trip(tmp_path: Path, gate: Gate) -> None:
    model = adapted(gate)
    file = extract_adapter(model, base_fingerprint="f1", tokenizer_sha256="t1", extra={"steps": 3, "lr": ["a", None]})
    path = tmp_path / "new" / "adapter.safetensors"
    file.save(path)
    again = read_adapter(path)
    assert same(again, file)
    assert again.config == model.adapter
    stated = read_header(path)
    assert (stated.config, stated.base_shape, stated.extra) == (again.config, again.base_shape, again.extra)
    assert not stated.tensors
    assert (again.base_fingerprint, again.tokenizer_sha256, again.extra) == (
        "f1",
        "t1",
        {"steps": 3, "lr": ["a", None]},
    )
    assert again.base_shape == {
        "dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "hidden_dim": HIDDEN,
        "vocab_size": VOCAB,
    }  # fmt: skip
    fresh = base()
    apply_adapter(fresh, again, fingerprint="f1", tokenizer_sha256="t1")
    torch.testing.assert_close(logits(fresh), logits(model), rtol=0, atol=0)
    assert not torch.equal(logits(fresh), logits(base()))
    trainable = {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    assert trainable == {f"layers.{i}.attention.adaption.{x}" for i in (2, 3, 4) for x in ("prompt", "gate")}
    assert os.listdir(path.parent) == ["adapter.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "adapter.safetensors"
    file = extract_adapter(adapted())
    file.save(path)

    def fail(tensors: dict, part: Path, **_) -> None:
        part.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("adapter.adapter_file.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        file.save(path)
    assert same(read_adapter(path), file)
    assert os.listdir(tmp_path) == [path.name]


def test_nothing_to_save_is_an_error() -> None:
    with pytest.raises(ValueError, match="holds no adapter"):
        extract_adapter(base())


@pytest.mark.parametrize("change", ["dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size"])
def test_a_base_of_another_shape_is_refused(change: str) -> None:
    bigger = {"dim": 48, "n_layers": 6, "n_heads": 6, "n_kv_heads": 4, "hidden_dim": 41, "vocab_size": 37}
    other = Decoder(replace(CONFIG, **{change: bigger[change]}))
    with pytest.raises(
        CheckpointError, match=rf"wants {change} {getattr(CONFIG, change)}, this base has {bigger[change]}"
    ):
        apply_adapter(other, extract_adapter(adapted()))
    assert other.adapter is None


def test_other_weights_or_tokenizer_are_refused() -> None:
    file = extract_adapter(adapted(), base_fingerprint="f1", tokenizer_sha256="t1")
    model = base()
    with pytest.raises(CheckpointError, match="other weights: fingerprint f1…, here f2…"):
        apply_adapter(model, file, fingerprint="f2")
    with pytest.raises(CheckpointError, match="another tokenizer: sha256 t1…, here t2…"):
        apply_adapter(model, file, fingerprint="f1", tokenizer_sha256="t2")
    assert model.adapter is None
    apply_adapter(model, file)  # what is not known is not compared
    apply_adapter(model, replace(file, base_fingerprint=None), fingerprint="f2")


@pytest.mark.parametrize(("header", "message"), [
    ({"version": "3"}, "format version '3'"),
    ({"gate": "sigmoid"}, "header is damaged.*sigmoid"),
    ({"n_layers": "4"}, "4 layers of 7 prompts"),
    ({"n_layers": "three"}, "header is damaged"),
    ({"base_shape": "[]"}, "header is damaged"),
    ({"base_shape": '{"width": 3}'}, "header is damaged.*width"),
    ({"extra": "{"}, "header is damaged"),
])  # fmt: skip
def test_own_files_that_are_refused(tmp_path: Path, header: dict[str, str], message: str) -> None:
    path = tmp_path / "adapter.safetensors"
    extract_adapter(adapted()).save(path)
    with safe_open(path, framework="pt") as file:
        good = file.metadata()
    save_file({key: tensor.clone() for key, tensor in load_file(path).items()}, path, metadata={**good, **header})
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(path)
    assert str(path) in str(caught.value)


def test_other_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        read_adapter(path)
    file = extract_adapter(adapted())
    file.save(path)
    with pytest.raises(CheckpointError, match="gates are for 'tanh', not 'identity'"):
        read_adapter(path, gate="identity")
    with pytest.raises(ValueError, match="gate must be"):
        read_adapter(path, gate="relu")  # type: ignore[arg-type]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        read_adapter(path)
    replace(file, tensors={**file.tensors, "prompt": file.prompt * float("nan")}).save(path)
    with pytest.raises(CheckpointError, match="a prompt is not finite"):
        read_adapter(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"no adapter of a known format.*it holds weight"):
        read_adapter(path)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"peft_type": "IA3"}', "JSON"),
        (b"\xef\xbb\xbf\n[1, 2]", "JSON"),
        (b"GGUF\3\0\0\0" + bytes(64), "a GGUF file"),
        (b"PAR1" + bytes(64), "a Parquet file"),
        (b"train:\n  epochs: 3\n", "text"),
        (b"", "an empty file"),
    ],
    ids=["object", "list", "GGUF", "Parquet", "text", "empty"],
)
def test_a_file_of_another_kind_is_called_by_its_kind(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / "adapter.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"adapter\.bin: {kind}, not tensors; name a file in safetensors'"):
        read_adapter(path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB_FOLDER"],)


def test_a_pickle_never_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB_FOLDER", str(tmp_path / "exploded"))
    torch.save({"adapter_query.weight": Bomb()}, tmp_path / "adapter.pth")
    with pytest.raises(CheckpointError, match=r"adapter\.pth: refused.*can run code"):
        read_adapter(tmp_path / "adapter.pth")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("convention", ["tanh", "identity"])
@pytest.mark.parametrize("shape", [(1, -1, 1, 1), (-1,)])
def test_official_v1_per_head_gates(tmp_path: Path, convention: Gate, shape: tuple[int, ...]) -> None:
    """As the official release is: gates on every layer, those below the adapted ones still zero."""
    model = adapted(convention)
    file = extract_adapter(model)
    state = {f"layers.{i}.attention.gate": torch.zeros(HEADS).view(shape) for i in range(LAYERS)}
    state |= {f"layers.{i}.attention.gate": gate.view(shape) for i, gate in enumerate(file.gate, LAYERS - L)}
    torch.save({**state, "adapter_query.weight": file.prompt.view(L * K, DIM)}, tmp_path / "v1.pth")
    read = read_adapter(tmp_path / "v1.pth", gate=convention)
    assert same(read, file)
    fresh = base()
    apply_adapter(fresh, read, fingerprint="anything: the file has none")
    torch.testing.assert_close(logits(fresh), logits(model), rtol=0, atol=0)


def test_official_v1_scalar_gates_in_half_precision(tmp_path: Path) -> None:
    prompt, gate = torch.randn(L, K, DIM).half(), torch.tensor([0.3, -0.2, 0.5]).half()
    state = {f"layers.{i + 2}.attention.gate": gate[i : i + 1] for i in range(L)}
    torch.save({"model": {**state, "adapter_query.weight": prompt.view(-1, DIM)}}, tmp_path / "v1.pth")
    file = read_adapter(tmp_path / "v1.pth")
    assert file.config.gate == "identity"
    assert torch.equal(file.gate, gate[:, None].float())
    model = base()
    apply_adapter(model, file)
    assert torch.equal(model.adaptions[1].gate, gate[1].float().expand(HEADS))
    state = {key: value.squeeze() for key, value in state.items()}  # without a dimension at all
    torch.save({**state, "adapter_query.weight": prompt.view(-1, DIM)}, tmp_path / "v1.pth")
    assert same(read_adapter(tmp_path / "v1.pth"), file)


def test_official_v1_layers_that_cannot_be_inferred(tmp_path: Path) -> None:
    path = tmp_path / "v1.pth"
    gates = {f"layers.{i}.attention.gate": torch.full((1,), float(i >= 2)) for i in range(4)}
    torch.save({**gates, "adapter_query.weight": torch.randn(8, DIM)}, path)
    with pytest.raises(CheckpointError, match="state how many layers are adapted"):
        read_adapter(path)
    assert read_adapter(path, n_layers=2).prompt.shape == (2, 4, DIM)
    with pytest.raises(CheckpointError, match="3 layers do not fit 8 prompt rows"):
        read_adapter(path, n_layers=3)


@pytest.mark.parametrize("nested", [False, True])
def test_litgpt(tmp_path: Path, nested: bool) -> None:
    model = adapted("identity")
    file = extract_adapter(model)
    state = {}
    for layer, (prompt, gate) in enumerate(zip(file.prompt, file.gate, strict=True), LAYERS - L):
        state[f"transformer.h.{layer}.attn.gating_factor"] = gate.view(1, 1, HEADS, 1)
        state[f"transformer.h.{layer}.attn.adapter_wte.weight"] = prompt
    path = tmp_path / "lit_model.pth.adapter"
    torch.save({"model": state} if nested else state, path)
    read = read_adapter(path)
    assert same(read, file)
    assert read.config == model.adapter
    with pytest.raises(CheckpointError, match="gates are for 'identity', not 'tanh'"):
        read_adapter(path, gate="tanh")


@pytest.mark.parametrize(("change", "message"), [
    ({"transformer.h.3.attn.gating_factor": None}, "layer 3 has a prompt only"),
    ({"transformer.h.3.attn.adapter_wte.weight": None}, "layer 3 has a gate only"),
    ({"transformer.h.3.attn.adapter_wte.weight": torch.ones(5, DIM)}, r"layer 3's prompt has shape \(5, 24\)"),
    ({"transformer.h.3.attn.adapter_wte.weight": torch.ones(DIM)}, r"adapter_wte\.weight has shape \(24,\)"),
    ({"transformer.h.3.attn.adapter_wte.weight": None, "transformer.h.3.attn.gating_factor": None}, "neighbouring"),
    ({"transformer.h.3.attn.adapter_scale": torch.ones(1)}, "adapter_scale is no part"),
])  # fmt: skip
def test_litgpt_files_that_are_refused(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    state: dict[str, Tensor | None] = {}
    for layer in (2, 3, 4):
        state[f"transformer.h.{layer}.attn.gating_factor"] = torch.ones(1, 1, HEADS, 1)
        state[f"transformer.h.{layer}.attn.adapter_wte.weight"] = torch.ones(K, DIM)
    state |= change
    torch.save({key: tensor for key, tensor in state.items() if tensor is not None}, tmp_path / "lit.pth")
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path / "lit.pth")


@pytest.fixture(scope="module")
def peft_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A base and a PEFT adapter with open gates, both saved by their own libraries, and the logits they give."""
    folder = tmp_path_factory.mktemp("peft")
    torch.manual_seed(0)
    model = LlamaForCausalLM(HFConfig(
        vocab_size=VOCAB, hidden_size=DIM, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=64, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2,
    )).eval()  # fmt: skip
    model.save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a name that transformers is renaming
        peft = get_peft_model(model, AdaptionPromptConfig(adapter_layers=L, adapter_len=K, task_type="CAUSAL_LM"))
    for name, parameter in peft.named_parameters():
        if "adaption_gate" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # past what tanh could give
    peft.save_pretrained(folder / "adapter")
    with torch.no_grad():
        return folder, peft(IDS).logits


def test_peft_logits(peft_folder: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, wanted = peft_folder
    model = load_decoder(folder / "base")
    bare = logits(model)
    for path in (folder / "adapter", folder / "adapter" / "adapter_model.safetensors"):
        file = read_adapter(path)
        assert file.config == AdaptionConfig(n_layers=L, prompt_length=K, gate="identity")
        apply_adapter(model, file)
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)
    assert (wanted - bare).abs().max() > 0.1
    extract_adapter(model).save(tmp_path / "ours.safetensors")  # per head from here on
    assert read_adapter(tmp_path / "ours.safetensors").gate.shape == (L, HEADS)


def test_peft_folders_that_are_refused(peft_folder: tuple[Path, Tensor], tmp_path: Path) -> None:
    adapter = peft_folder[0] / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    with pytest.raises(CheckpointError, match=r"without PEFT's adapter_config\.json"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(CheckpointError, match="peft_type is 'IA3'"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "adapter_len": K + 1}))
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        read_adapter(tmp_path)
    torch.save(load_file(adapter / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_len \(3, 8\), adapter_model\.bin has \(3, 7\)"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert same(read_adapter(tmp_path), read_adapter(adapter))


def test_a_foreign_adapter_for_more_layers_is_refused(peft_folder: tuple[Path, Tensor]) -> None:
    file = read_adapter(peft_folder[0] / "adapter")
    with pytest.raises(CheckpointError, match="wants n_layers 5, this base has 2"):
        apply_adapter(Decoder(replace(CONFIG, n_layers=2)), file)
    with pytest.raises(CheckpointError, match="has 3 layers, this base has only 2"):
        apply_adapter(Decoder(replace(CONFIG, n_layers=2)), replace(file, base_shape={}))
