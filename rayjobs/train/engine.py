"""DeepSpeed around a frozen decoder: ZeRO stages 0-3, and a training state that knows neither stage nor world size.

The base is held in `dtype`, what is trained in float32, so there are no hidden master weights: DeepSpeed is not told of
mixed precision, and partitions gradients, optimizer state and (stage 3) parameters as they are. One step is any number
of micro-batches: gradients pile up until `step`.
"""

import collections
import logging
from collections.abc import Iterable
from types import ModuleType
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from adapter.adaption import AdaptionConfig
from adapter.base_checkpoint import open_checkpoint, meta_llama
from adapter.decoder import Llama
from adapter.image_projection import Images
from rayjobs.config import config
from rayjobs.errors import UserError
from rayjobs.models.base_model import TORCH_DTYPES, Dtype
from rayjobs.storage.download import cached_path

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
OPTIMIZER_STEP_KEY = "optimizer.step"


@config
class ZeroConfig:
    """DeepSpeed's ZeRO: what is partitioned over the workers."""

    stage: Literal[0, 1, 2, 3] = 2
    """0 nothing, 1 optimizer state, 2 gradients too, 3 the frozen base too."""
    offload_optimizer: dict[str, Any] | None = None
    """DeepSpeed's `offload_optimizer` section, e.g. {device: cpu}."""
    offload_param: dict[str, Any] | None = None
    """DeepSpeed's `offload_param` section (stage 3), e.g. {device: cpu}."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keys of DeepSpeed's `zero_optimization`, passed through."""


@config
class OptimizerConfig:
    """AdamW; the defaults are LLaMA-Adapter's."""

    base_lr: float = Field(default=9e-3, gt=0)
    """Learning rate at a global batch of 256 examples; it is scaled by global_batch / 256."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the moments."""
    weight_decay: float = Field(default=0.02, ge=0)
    """Decoupled weight decay, on prompts and gates alike."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Clip the global gradient norm to this; null for no clipping, as in the paper."""


def _deepspeed() -> ModuleType:
    """DeepSpeed, imported where it is used: it takes seconds. None of its compiled ops is needed here, and probing for
    them would start a compiler on every node."""
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
    logger.setLevel(logging.ERROR)
    return deepspeed


def deepspeed_config(zero: ZeroConfig, clip_norm: float | None) -> dict[str, Any]:
    stage: dict[str, Any] = {"stage": zero.stage}
    if zero.stage == 3:  # by DeepSpeed's own defaults a worker keeps up to a billion parameters that it has gathered
        stage |= {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 100_000_000}
    stage |= zero.options
    for name in ("offload_optimizer", "offload_param"):
        if getattr(zero, name) is not None:
            stage[name] = getattr(zero, name)
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants a number; batches are ours
        "managed_gradient_accumulation": False,  # step() is the boundary, however many micro-batches came before
        "gradient_clipping": clip_norm or 0.0,
        "zero_optimization": stage,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 40,
    }


def adapted_model(
    path: str, adaption: AdaptionConfig, *, dtype: Dtype, zero: ZeroConfig, seed: int, device: torch.device
) -> Llama:
    """The frozen base with a fresh adaption drawn from `seed`, equal on every worker whatever the stage.

    Weights are placed one tensor at a time; under stage 3 each is cut at once and a worker keeps only its shard.
    """
    checkpoint = open_checkpoint(cached_path(path))
    model = meta_llama(checkpoint.config)
    with torch.device("meta"):
        model.add_adapter(adaption)
    generator = torch.Generator().manual_seed(seed)

    def place(tensors: Iterable[tuple[str, Tensor]], to: torch.dtype) -> None:
        for name, tensor in tensors:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            trainable = getattr(module, leaf).requires_grad
            parameter = nn.Parameter(
                tensor.to(device=device, dtype=to, copy=True).contiguous(), requires_grad=trainable
            )
            setattr(module, leaf, parameter)
            if zero.stage == 3:
                _partition(parameter, zero, to)

    place(checkpoint.tensors(), TORCH_DTYPES[dtype])
    model.reset_adapter(generator, "cpu")
    place([(name, tensor.detach()) for name, tensor in model.adapter_parameters()], torch.float32)
    model.tie()
    return model


def _partition(parameter: nn.Parameter, zero: ZeroConfig, dtype: torch.dtype) -> None:
    """Cuts one parameter into every worker's shard, in place."""
    holder = nn.Module()
    holder.register_parameter("parameter", parameter)
    _deepspeed().zero.Init(module=holder, config_dict_or_path=deepspeed_config(zero, None), dtype=dtype)


class Engine:
    """A model in training. Losses must be divided by the global batch's label count by the caller."""

    def __init__(self, model: Llama, zero: ZeroConfig, optimizer: OptimizerConfig) -> None:
        self.width = 0 if model.vision is None else model.vision.down.in_features
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        adamw = torch.optim.AdamW(trainable, betas=optimizer.betas, weight_decay=optimizer.weight_decay)
        self.engine, self.optimizer, _, _ = _deepspeed().initialize(
            model=model,
            optimizer=adamw,
            config=deepspeed_config(zero, optimizer.clip_norm),
            dist_init_required=False,
        )
        self.trainable = dict(zip(self.names, trainable, strict=True))
        self.partitioned = zero.stage > 0
        self.device = self.engine.device
        self.world = torch.distributed.get_world_size()
        self._prime()

    def loss(self, tokens: Tensor, labels: Tensor, images: Images | None = None) -> Tensor:
        """The summed loss of one micro-batch (B, T), with its images' features (n, F) and their rows (n,).

        An adapter that reads images is given some for every micro-batch, if only n = 0 of them: all workers then agree
        on which gradients there are.
        """
        if images is None and self.width:
            images = torch.zeros(0, self.width), torch.zeros(0, dtype=torch.int64)
        if images is not None:
            images = images[0].to(self.device), images[1].to(self.device)
        return self.engine(tokens.to(self.device), labels.to(self.device), images)

    def backward(self, loss: Tensor) -> None:
        """Adds this micro-batch's gradient. DeepSpeed averages over workers where the loss wants a sum."""
        self.engine.backward(loss * self.world, scale_wrt_gas=False)

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()

    def state(self) -> dict[str, Tensor]:
        """Every trainable tensor and its moments, whole, float32, on the CPU. All workers must call it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state = {}
        for name, parameter in self.trainable.items():
            full = safe_get_full_fp32_param(parameter) if self.partitioned else parameter
            state[name] = full.detach().cpu().clone()
            for moment in ADAM_MOMENTS:
                if self.partitioned:
                    value = safe_get_full_optimizer_state(parameter, moment)
                else:
                    value = self.optimizer.state[parameter][moment]
                state[f"{name}.{moment}"] = value.cpu().clone()
        state[OPTIMIZER_STEP_KEY] = torch.tensor(float(self._steps()[0]))
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Puts a state back, whatever stage and number of workers it came from. All workers must call it."""
        expected = {OPTIMIZER_STEP_KEY} | {
            f"{name}{end}" for name in self.names for end in ("", *(f".{m}" for m in ADAM_MOMENTS))
        }
        if expected != set(state):
            raise UserError(f"the training state does not fit the adapter: {sorted(expected ^ set(state))[:4]} differ")
        for name, parameter in self.trainable.items():
            self._put(parameter, state[name].to(self.device))
            for moment in ADAM_MOMENTS:
                self._put(parameter, state[f"{name}.{moment}"].to(self.device), moment)
        for step in self._steps():
            step.fill_(state[OPTIMIZER_STEP_KEY].item())
        self._publish(state)

    def _put(self, parameter: Tensor, whole: Tensor, *moment: str) -> None:
        """A parameter's value, or one of its moments, into what this worker's optimizer keeps of it."""
        from deepspeed import utils

        if hasattr(
            parameter, "ds_tensor"
        ):  # stage 3: here DeepSpeed forgets that an uneven tensor was padded to be cut
            size = parameter.ds_tensor.numel()
            padded = nn.functional.pad(whole.flatten(), (0, size * self.world - whole.numel()))
            set_local = utils.safe_set_local_optimizer_state if moment else utils.safe_set_local_fp32_param
            set_local(parameter, padded.split(size)[torch.distributed.get_rank()], *moment)
        elif self.partitioned:
            set_full = utils.safe_set_full_optimizer_state if moment else utils.safe_set_full_fp32_param
            set_full(parameter, whole, *moment)
        elif moment:
            self.optimizer.state[parameter][moment[0]].copy_(whole)

    def _publish(self, state: dict[str, Tensor]) -> None:
        """Lets the model compute with the values that the optimizer was given."""
        zero = _deepspeed().zero
        for name, parameter in self.trainable.items():
            with torch.no_grad(), zero.GatheredParameters([parameter], modifier_rank=0):
                if parameter.numel():
                    parameter.copy_(state[name])

    def _steps(self) -> list[Tensor]:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return [state["step"] for state in inner.state.values()]

    def _prime(self) -> None:
        """One step at lr 0 on no labels: zero gradients make zero moments, so that there is a state to get and set."""
        nothing = torch.zeros(1, 1, dtype=torch.int64)
        self.backward(self.loss(nothing, nothing - 100))
        self.step(lr=0.0)
        for step in self._steps():
            step.zero_()
