"""Train a decoder's adapter, of any method, with DeepSpeed, under ZeRO stages 0-3.

The frozen base is held in `dtype` and the trainable parameters in float32, so that there are no separate master
weights: DeepSpeed is not told of mixed precision and partitions gradients, optimizer state and (stage 3) parameters as
they are. Weights in 8 or 4 bits are buffers, which it leaves alone. An optimizer step takes any number of
micro-batches: gradients accumulate until `step`. The training state that `tensors` yields does not depend on the stage
or the number of workers.
"""

import collections
import logging
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from adapter.base.binding import meta_decoder
from adapter.base.checkpoint import open_checkpoint
from adapter.base.quantization import PRECISIONS, reading_dtype, set_weight
from adapter.decoder import Decoder
from adapter.image_projection import Images
from adapter.loss import IGNORE
from adapter.methods.base import AdapterMethod
from rayjobs.errors import ConfigError, ProvenanceError
from rayjobs.models.base_model import Dtype
from rayjobs.storage.download import cached_path
from rayjobs.train.config import OptimizerConfig, ZeroConfig

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN, IMAGES = "optimizer.step", "optimizer.step.images"
"""Names of the groups of parameters, and of their counts of steps in a checkpoint: all parameters, or those that
records without an image train; and those that records with an image train, where these are others."""


@cache
def _deepspeed() -> ModuleType:
    """Import DeepSpeed 0.19 without what it would import and compile for parts that are not used here.

    As soon as it asks whether one of its extensions is compatible, it would look for a compiler on every node; the
    attribute has no public setting, and DeepSpeed fills it when it is first read. Its autotuner would import MLflow,
    and its Muon PyTorch's compiler, which together take as long as all else.
    """
    with _replaced(sys.modules, "mlflow", None), _replaced(vars(torch), "compile", lambda function: function):
        import deepspeed
        import deepspeed.ops
        import deepspeed.runtime.zero.muon.muon_optimizer
        from deepspeed.utils import logger

    deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
    logger.setLevel(logging.ERROR)
    return deepspeed


@contextmanager
def _replaced(names: MutableMapping[str, Any], name: str, value: Any) -> Iterator[None]:
    """Replace the value of a name in this block, or set it for the block."""
    missing = object()
    before = names.get(name, missing)
    names[name] = value
    try:
        yield
    finally:
        if before is missing:
            del names[name]
        else:
            names[name] = before


def deepspeed_config(zero: ZeroConfig, clip_norm: float | None) -> dict[str, Any]:
    """Return DeepSpeed's configuration."""
    stage: dict[str, Any] = {"stage": zero.stage}
    if zero.stage == 3:  # with DeepSpeed's defaults a worker keeps up to a billion gathered parameters
        stage |= {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 100_000_000}
    stage |= zero.options
    for name in ("offload_optimizer", "offload_param"):
        if getattr(zero, name) is not None:
            stage[name] = getattr(zero, name)
    return {
        "zero_allow_untested_optimizer": True,  # `GroupedAdamW`, which is AdamW in the groups that it steps
        "train_micro_batch_size_per_gpu": 1,  # required, but unused: the caller forms the batches
        "managed_gradient_accumulation": False,  # step() ends the accumulation, after any number of micro-batches
        "gradient_clipping": clip_norm or 0.0,
        "zero_optimization": stage,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 40,
    }


def adapted_model(
    path: str, adapter: AdapterMethod, *, dtype: Dtype, zero: ZeroConfig, seed: int, device: torch.device
) -> Decoder:
    """Return the base with a fresh adapter drawn from `seed`, equal on every worker whatever the stage.

    Weights are placed one tensor at a time. Under stage 3 each is partitioned at once, and a worker keeps its shard; a
    quantized base, whose weights are no parameters, cannot be partitioned, and is refused with a ConfigError.

    Raises AdapterError if the base cannot take the adapter.
    """
    check_zero(zero, dtype)
    adapter.check_precision(dtype)
    checkpoint, precision = open_checkpoint(cached_path(path)), PRECISIONS[dtype]
    model = meta_decoder(checkpoint.config)
    for name, tensor in checkpoint.tensors(partial(reading_dtype, model, precision=precision), device):
        set_weight(model, name, tensor, precision)
        _partition(model, name, zero)
        del tensor
    model.tie()
    model.add_adapter(adapter, torch.Generator().manual_seed(seed))
    base = {name for name, _ in model.base_parameters()}
    for name, _ in list(model.adapter_parameters()):
        if name not in base:
            _partition(model, name, zero)
    return model


def check_zero(zero: ZeroConfig, dtype: Dtype) -> None:
    """Raise ConfigError for a stage that would have to partition a quantized base."""
    if zero.stage == 3 and PRECISIONS[dtype].quantization:
        raise ConfigError(
            f"zero.stage is 3, which partitions the base over the workers, and base.dtype is {dtype}, which cannot be "
            "partitioned: set zero.stage to at most 2, or base.dtype to bf16"
        )


def _partition(model: Decoder, name: str, zero: ZeroConfig) -> None:
    """Under stage 3, keep only this worker's shard of the parameter of this name."""
    if zero.stage == 3:
        parameter = model.get_parameter(name)
        holder = nn.Module()
        holder.register_parameter("parameter", parameter)
        _deepspeed().zero.Init(module=holder, config_dict_or_path=deepspeed_config(zero, None), dtype=parameter.dtype)


class GroupedAdamW(torch.optim.AdamW):
    """AdamW that leaves a group whose `idle` is True as it is: weights, moments and count of steps.

    With gradients of 0, weight decay and the moments of earlier steps would go on moving it.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__([{"idle": False, **group} for group in groups], **settings)
        self.held: dict[str, dict[int, Tensor]] = {group["name"]: {} for group in groups}
        """The tensors of each group's state, whatever ZeRO makes of its parameters."""

    def make_moments(self) -> None:
        """Create moments of 0. ZeRO-1 and 2 look for those of all groups after the first group's first step."""
        for parameter in (one for group in self.param_groups for one in group["params"]):
            moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in ADAM_MOMENTS}
            self.state[parameter] = {"step": torch.zeros(()), **moments}

    def step(self, closure: Any = None) -> Any:
        """Step every group that is not idle."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["idle"]]
        for group in self.param_groups:
            self.held[group["name"]].update((id(one), one) for one in group["params"])
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


class Engine:
    """A model in training. The caller divides losses by the number of labelled tokens in the global batch."""

    def __init__(self, model: Decoder, zero: ZeroConfig, optimizer: OptimizerConfig) -> None:
        self.width = 0 if model.vision is None else model.vision.down.in_features
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        of_images = model.image_parameters
        named: dict[str, list[nn.Parameter]] = {name: [] for name in ([MAIN, IMAGES] if of_images else [MAIN])}
        for name, parameter in zip(self.names, trainable, strict=True):
            named[IMAGES if name in of_images else MAIN].append(parameter)
        adamw = GroupedAdamW(
            [{"name": name, "params": parameters} for name, parameters in named.items()],
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
        )
        self.deepspeed, self.optimizer, _, _ = _deepspeed().initialize(
            model=model,
            optimizer=adamw,
            config=deepspeed_config(zero, optimizer.clip_norm),
            dist_init_required=False,
        )
        self.groups, self.separates_images = list(named), model.separates_images
        self.trainable = dict(zip(self.names, trainable, strict=True))
        self.stage = zero.stage
        self.inner: GroupedAdamW = getattr(self.optimizer, "optimizer", self.optimizer)
        self.device = self.deepspeed.device
        self.world = torch.distributed.get_world_size()
        self.inner.make_moments()
        self._prime()

    def loss(self, tokens: Tensor, labels: Tensor, images: Images | None = None) -> Tensor:
        """Return the summed loss of one micro-batch (B, T) with image features (n, F) and their rows (n,).

        An adapter that reads images is given n = 0 features for a micro-batch without images, so that all workers have
        gradients of the same parameters.
        """
        if images is None and self.width:
            images = torch.zeros(0, self.width), torch.zeros(0, dtype=torch.int64)
        if images is not None:
            images = images[0].to(self.device), images[1].to(self.device)
        return self.deepspeed(tokens, labels, images)

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradient. DeepSpeed averages over workers; the factor makes that a sum."""
        self.deepspeed.backward(loss * self.world, scale_wrt_gas=False)

    def step(self, lr: float, *, text: bool = True, images: bool = True) -> None:
        """Update the trainable parameters with the accumulated gradient and clear it.

        text, images: the step has records without an image, or with one, on any worker. Where they train disjoint
        parameters, those of a kind that the step does not have stay as they are.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["idle"] = self.separates_images and not (text if group["name"] == MAIN else images)
        self.deepspeed.step()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every trainable tensor and its moments, whole, in float32, on the device, one gathered at a time.

        They may be those that the training goes on to change. All workers must take all of them, together.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self.trainable.items():
            yield name, (safe_get_full_fp32_param(parameter) if self.stage > 0 else parameter).detach()
            for moment in ADAM_MOMENTS:
                if self.stage > 0:
                    yield f"{name}.{moment}", safe_get_full_optimizer_state(parameter, moment)
                else:
                    yield f"{name}.{moment}", self.optimizer.state[parameter][moment]
        for group in self.groups:
            yield group, torch.tensor(float(self._steps(group)[0]))

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore a state, saved under any stage and number of workers. All workers must call it."""
        expected = set(self.groups) | {
            f"{name}{end}" for name in self.names for end in ("", *(f".{m}" for m in ADAM_MOMENTS))
        }
        if expected != set(state):
            raise ProvenanceError(f"the checkpoint is of another adapter: {sorted(expected ^ set(state))[:4]} differ")
        for name, parameter in self.trainable.items():
            self._put(parameter, state[name].to(self.device))
            for moment in ADAM_MOMENTS:
                self._put(parameter, state[f"{name}.{moment}"].to(self.device), moment)
        for group in self.groups:
            for step in self._steps(group):
                step.fill_(state[group].item())
        self._publish(state)

    def _put(self, parameter: Tensor, whole: Tensor, *moment: str) -> None:
        """Set a parameter, or one of its moments, in this worker's part of the optimizer."""
        from deepspeed import utils

        if self.stage == 3:
            # DeepSpeed's own setter fails on tensors that it has padded to partition them evenly.
            size = utils.safe_get_local_fp32_param(parameter).numel()
            padded = nn.functional.pad(whole.flatten(), (0, size * self.world - whole.numel()))
            set_local = utils.safe_set_local_optimizer_state if moment else utils.safe_set_local_fp32_param
            set_local(parameter, padded.split(size)[torch.distributed.get_rank()], *moment)
        elif self.stage > 0:
            set_full = utils.safe_set_full_optimizer_state if moment else utils.safe_set_full_fp32_param
            set_full(parameter, whole, *moment)
        elif moment:
            self.optimizer.state[parameter][moment[0]].copy_(whole)

    def _publish(self, state: dict[str, Tensor]) -> None:
        """Copy the values that the optimizer was given into the model's parameters."""
        zero = _deepspeed().zero
        for name, parameter in self.trainable.items():
            with torch.no_grad(), zero.GatheredParameters([parameter], modifier_rank=0):
                if parameter.numel():
                    parameter.copy_(state[name])

    def _steps(self, group: str) -> list[Tensor]:
        """The counts of steps of a group's tensors, all equal."""
        return [self.inner.state[held]["step"] for held in self.inner.held[group].values()]

    def _prime(self) -> None:
        """Make one step at learning rate 0 without labels: after it ZeRO's moments, of zero gradients, can be set."""
        nothing = torch.zeros(1, 1, dtype=torch.int64)
        self.backward(self.loss(nothing, torch.full_like(nothing, IGNORE)))
        self.step(lr=0.0)
        for group in self.groups:
            for step in self._steps(group):
                step.zero_()
