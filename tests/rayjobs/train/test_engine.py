"""The engine under real DeepSpeed and two real processes: stages agree, a state moves between them, and nothing that is
frozen moves by a bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rayjobs.train.engine import GroupedAdamW
from tests.conftest import ROOT
from tests.rayjobs.cafo_dataset import make_encoders

SCRIPT = """
import json, sys, torch, torch.distributed as dist
from adapter.methods.registry import make_method
from adapter.base.checkpoint import load_decoder, open_checkpoint
from adapter.base.quantization import PRECISIONS
from rayjobs.config import load
from rayjobs.train.config import OptimizerConfig, ZeroConfig
from rayjobs.train.engine import Engine, adapted_model
from rayjobs.models.image_conditioning import ImageFeaturizer, VisionConfig

base, out, dtype, offload, method = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "offload", sys.argv[6]
shows, apart, lr = method in ("zero_init", "v2"), method == "v2", 0.03 if method in ("zero_init", "lora") else 0.001
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
conditioning = load(VisionConfig, {"encoder": {"kind": "clip", "weights": sys.argv[5]}, "bottleneck": 7}).open()
featurizer = ImageFeaturizer(conditioning.encoder, "cpu")
encoder_before = {name: tensor.clone() for name, tensor in featurizer.encoder.model.state_dict().items()}

def engine(stage):
    zero = ZeroConfig(stage=stage, offload_optimizer={"device": "cpu"} if offload else None)
    vision = conditioning.projection if shows else None
    adapter = make_method(method, n_layers=2, prompt_length=5, rank=3, vision=vision)
    model = adapted_model(base, adapter, dtype=dtype, zero=zero, seed=1, device=torch.device("cpu"))
    if stage == 3:
        assert all(parameter.numel() == 0 for _, parameter in model.base_parameters())
        local = sum(parameter.ds_tensor.numel() for parameter in model.parameters())
        assert local < 0.6 * sum(parameter.ds_numel for parameter in model.parameters())
    return Engine(model, zero, OptimizerConfig(clip_norm=0.05))

def image_bytes(row):
    return torch.sin(row[:1] * torch.arange(3.0 * 32 * 32)).numpy().tobytes()

def whole(engine, frozen):  # its parameters, gathered
    import deepspeed
    found = {n: p for n, p in engine.deepspeed.module.named_parameters() if p.requires_grad != frozen}
    with deepspeed.zero.GatheredParameters(list(found.values())):
        return {name: parameter.detach().clone() for name, parameter in found.items()}

def frozen_to_the_bit(engine):  # base and encoder, after training
    kept, now = whole(engine, True), featurizer.encoder.model.state_dict()
    precision = PRECISIONS[dtype]
    loaded = load_decoder(base, dtype=precision.dtype, quantization=precision.quantization)
    there = dict(loaded.named_parameters())
    assert (precision.quantization is None) == (not list(loaded.buffers()))
    buffers = dict(engine.deepspeed.module.named_buffers())  # quantized weights
    if method == "full":
        return not kept
    same = all(torch.equal(kept[name], tensor) for name, tensor in there.items())
    same = same and all(torch.equal(buffers[name], tensor) for name, tensor in loaded.named_buffers())
    encoder_same = all(torch.equal(now[name], value) for name, value in encoder_before.items())
    return kept.keys() == there.keys() and same and encoder_same

def copies(engine):
    return {name: tensor.cpu().clone() for name, tensor in engine.tensors()}

def train(engine, steps):
    losses = []
    for step in steps:
        tokens = torch.randint(3, 97, (6, 17), generator=torch.Generator().manual_seed(step))
        total = torch.zeros(())
        # every other row has an image, so that some micro-batches of some workers have none; the second step has none
        seen = (tokens[:, 0] % 2 == 1) & (not apart or step != 1)
        own = tokens[rank::world]
        parts = own.chunk(1 + step % 3)  # 1 to 3 micro-batches
        if apart:
            parts = [own[seen[rank::world] == kind] for kind in (False, True)]
        for kind, part in enumerate(parts):
            labels = part.clone()
            labels[:, :5] = -100
            shown = [shows and seen[(tokens == row).all(1)].item() for row in part]
            assert not apart or set(shown) <= {bool(kind)}
            images = featurizer.images([image_bytes(row) if one else None for row, one in zip(part, shown)])
            if not len(part):
                part, labels = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), -100)
            loss = engine.loss(part, labels, images) / 72
            engine.backward(loss)
            total += loss.detach()
        still = whole(engine, False) if apart and step == 1 else {}
        engine.step(lr, images=bool(seen.any()))
        if still:
            of_images = [name for name in still if name in engine.deepspeed.module.image_parameters]
            now = whole(engine, False)
            assert len(of_images) == 5 and all(torch.equal(now[name], still[name]) for name in of_images)
            assert not all(torch.equal(now[name], still[name]) for name in still)
        dist.all_reduce(total)
        losses.append(total.item())
    return losses

found = {}
first = engine(0)
start = whole(first, False)
before = train(first, range(3))
state = copies(first)
names = {name for name, _ in first.deepspeed.module.adapter_parameters()}
assert all(name.removesuffix(".exp_avg").removesuffix(".exp_avg_sq") in names | set(first.groups) for name in state)
after = train(first, range(3, 6))
for stage in (0, 1, 2) if PRECISIONS[dtype].quantization else (0, 1, 2, 3):
    one = engine(stage)
    assert train(one, range(3)), "a fresh engine trains"
    one.load_state(state)
    saved = copies(one)
    exact = all(torch.equal(saved[name], state[name]) for name in state)
    fresh, resumed = train(engine(stage), range(3)), train(one, range(3, 6))
    moved = [name for name, tensor in whole(one, False).items() if (tensor != start[name]).any()]
    found[stage] = {"fresh": fresh, "resumed": resumed, "exact": exact, "frozen": frozen_to_the_bit(one)}
    found[stage]["moved"] = sorted(moved) == sorted(start)
if rank == 0:
    with open(out, "w") as file:
        json.dump({"before": before, "after": after, "stages": found}, file)
"""


def test_deepspeed_is_imported_without_what_takes_long_and_is_not_used() -> None:
    code = (
        "import sys, torch; from rayjobs.train.engine import _deepspeed; compiles = torch.compile; _deepspeed();"
        "assert torch.compile is compiles; print(*sorted({'mlflow', 'torch._dynamo', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_an_idle_group_stays_as_it_is_and_the_others_are_adamws() -> None:
    """Against one optimizer of PyTorch's for each group, of which the idle one's is not called."""
    weights = [torch.randn(7, generator=torch.Generator().manual_seed(seed)).requires_grad_() for seed in range(2)]
    copies = [one.detach().clone().requires_grad_() for one in weights]
    ours = GroupedAdamW([{"name": name, "params": [one]} for name, one in zip("ab", weights, strict=True)], lr=0.1)
    theirs = [torch.optim.AdamW([one], lr=0.1) for one in copies]
    for active in ({0, 1}, {0}, {0}, {1}, {0, 1}):
        for number, (one, copy) in enumerate(zip(weights, copies, strict=True)):
            one.grad = torch.randn(7) if number in active else torch.zeros(7)
            copy.grad = one.grad.clone()
            ours.param_groups[number]["idle"] = number not in active
            if number in active:
                theirs[number].step()
        ours.step()
        for one, copy in zip(weights, copies, strict=True):
            torch.testing.assert_close(one, copy, rtol=0, atol=0)
    assert [len(ours.held[name]) for name in "ab"] == [1, 1]


@pytest.mark.ray
@pytest.mark.parametrize(
    ("dtype", "offload", "method"),
    [
        ("fp32", "", "zero_init"),
        pytest.param("fp32", "offload", "zero_init", marks=pytest.mark.slow),
        pytest.param("bf16", "", "zero_init", marks=pytest.mark.slow),
        pytest.param("int8", "", "zero_init", marks=pytest.mark.slow),
        pytest.param("nf4", "", "zero_init", marks=pytest.mark.slow),
        pytest.param("fp32", "", "v2", marks=pytest.mark.slow),
        pytest.param("int8", "", "lora", marks=pytest.mark.slow),
        pytest.param("fp32", "", "full", marks=pytest.mark.slow),
    ],
)
def test_stages_give_the_same_losses_and_take_up_each_others_state(
    tiny_base: Path, tmp_path: Path, dtype: str, offload: str, method: str
) -> None:
    script, out = tmp_path / "script.py", tmp_path / "out.json"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", script]
    done = subprocess.run(
        [
            *command,
            tiny_base,
            out,
            dtype,
            offload or "stay",
            make_encoders(tmp_path / "encoders")["clip"]["weights"],
            method,
        ],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["before"] != found["after"]
    for stage, losses in found["stages"].items():
        assert losses["fresh"] == pytest.approx(found["before"], abs=2e-6), f"stage {stage}"
        assert losses["resumed"] == pytest.approx(found["after"], abs=2e-6), f"stage {stage}"
        assert losses["exact"], f"stage {stage}"
        assert losses["frozen"], f"stage {stage}: base or encoder moved"
        assert losses["moved"], f"stage {stage}: something that should learn did not"
