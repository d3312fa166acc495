"""The engine under real DeepSpeed and two real processes: stages agree, a state moves between them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPT = """
import json, sys, torch, torch.distributed as dist
from adapter.adaption import AdaptionConfig
from adapter.vision import VisionConfig
from rayjobs.engine import Engine, OptimizerConfig, ZeroConfig, adapted_model

base, out, dtype, offload = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "offload"
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()

def engine(stage):
    zero = ZeroConfig(stage=stage, offload_optimizer={"device": "cpu"} if offload else None)
    adaption = AdaptionConfig(n_layers=2, prompt_length=5, vision=VisionConfig(widths=(3, 4)))
    model = adapted_model(base, adaption, dtype=dtype, zero=zero, seed=1, device=torch.device("cpu"))
    if stage == 3:
        assert all(parameter.numel() == 0 for parameter in model.parameters() if not parameter.requires_grad)
        local = sum(parameter.ds_tensor.numel() for parameter in model.parameters())
        assert local < 0.6 * sum(parameter.ds_numel for parameter in model.parameters())
    return Engine(model, zero, OptimizerConfig(clip_norm=0.05))

def train(engine, steps):
    losses = []
    for step in steps:
        tokens = torch.randint(3, 97, (6, 17), generator=torch.Generator().manual_seed(step))
        total = torch.zeros(())
        for part in tokens[rank::world].chunk(1 + step % 3):  # as many micro-batches as it happens to be
            labels = part.clone()
            labels[:, :5] = -100
            rows = torch.nonzero(part[:, 0] % 2)[:, 0]  # some batches of some workers have no image at all
            loss = engine.loss(part, labels, (part[rows, :7].float(), rows) if len(rows) else None) / 72
            engine.backward(loss)
            total += loss.detach()
        engine.step(0.03)
        dist.all_reduce(total)
        losses.append(total.item())
    return losses

found = {}
first = engine(0)
before = train(first, range(3))
state = first.state()
after = train(first, range(3, 6))
for stage in (0, 1, 2, 3):
    one = engine(stage)
    assert train(one, range(3)), "a fresh engine trains"
    one.load_state(state)
    saved = one.state()
    exact = all(torch.equal(saved[name], state[name]) for name in state)
    found[stage] = {"fresh": train(engine(stage), range(3)), "resumed": train(one, range(3, 6)), "exact": exact}
if rank == 0:
    with open(out, "w") as file:
        json.dump({"before": before, "after": after, "stages": found}, file)
"""


@pytest.mark.ray
@pytest.mark.parametrize(("dtype", "offload"), [("fp32", ""), ("fp32", "offload"), ("bf16", "")])
def test_stages_give_the_same_losses_and_take_up_each_others_state(
    tiny_base: Path, tmp_path: Path, dtype: str, offload: str
) -> None:
    script, out = tmp_path / "script.py", tmp_path / "out.json"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", script]
    done = subprocess.run(
        [*command, tiny_base, out, dtype, offload or "stay"],
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
