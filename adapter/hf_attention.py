"""The parts of an adapter inside a transformers model, and the attention function that calls them (see `adapter.hf`).

B batch, T tokens, S keys, H query heads, G key/value heads, D channels of a head, K prompt length, C width, n images.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter.adaption import TRAINED_GATES, Gate, gate_factor
from adapter.errors import AdapterError
from adapter.image_projection import ImageProjection, ImageProjectionConfig, batch_images

PREFIX = "adaption_"
"""Beginning of a registered function's name, before that of the implementation that it calls."""


class Unsaved(nn.Module):
    """A module that moves with its model between devices, but stays in float32 and out of every state dict."""

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        return {} if destination is None else destination

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.update({prefix + name: parameter.detach() for name, parameter in self.named_parameters()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Unsaved":
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


class ImageTokens(Unsaved):
    """The image projection, and the features that it reads now, if any."""

    def __init__(self, config: ImageProjectionConfig | None, dim: int) -> None:
        super().__init__()
        self.projection = None if config is None else ImageProjection(config, dim)
        self.features: tuple[Tensor, Tensor] | None = None
        self.n_rows = 0

    def show(self, features: Sequence[Tensor | None]) -> None:
        """Set the images of the batches that follow, one row each."""
        assert self.projection is not None
        self.features, self.n_rows = batch_images(features, self.projection.down.in_features), len(features)

    def add_to(self, prompt: Tensor, batch: int) -> Tensor:
        """The prompts of every row, (B, K, C), or (1, K, C) where no image is shown, of the layer's prompt (K, C)."""
        if self.features is None:
            return prompt[None]
        assert self.projection is not None
        if batch % self.n_rows:
            raise AdapterError(f"a batch of {batch} rows cannot be shown the images of {self.n_rows} rows")
        features, rows = (x.to(self.projection.down.weight.device) for x in self.features)
        tokens = self.projection(features)
        tokens = tokens.new_zeros(self.n_rows, tokens.shape[1]).index_add(0, rows, tokens).to(prompt.device)
        return prompt + tokens.repeat_interleave(batch // self.n_rows, dim=0)[:, None]


class AttachedAdaption(Unsaved):
    """One layer's prompt (K, C) and gate (H,)."""

    def __init__(self, prompt: Tensor, gate: Tensor, convention: Gate, images: ImageTokens) -> None:
        super().__init__()
        self.prompt, self.convention = nn.Parameter(prompt), convention
        self.gate = nn.Parameter(gate, requires_grad=convention in TRAINED_GATES)
        self._images = [images]  # in a list, because all layers share the module and none owns it

    @property
    def images(self) -> ImageTokens:
        return self._images[0]

    def keys_values(self, attention: Any, query: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt's keys and values, each (B, G, K, D), by the layer's own projections."""
        prompt = self.images.add_to(self.prompt, len(query)).to(query.dtype)
        heads = (*prompt.shape[:2], -1, query.shape[3])
        keys, values = (project(prompt).view(heads).transpose(1, 2) for project in (attention.k_proj, attention.v_proj))
        if (norm := getattr(attention, "k_norm", None)) is not None:
            keys = norm(keys)
        return keys.expand(len(query), -1, -1, -1), values.expand(len(query), -1, -1, -1)

    def forward(
        self,
        base: Callable[..., tuple[Tensor, Tensor | None]],
        attention: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention to words and prompt (B, T, H, D), and the weights of the words if `base` gives them.

        base: the model's own attention function. query: (B, H, T, D), rotated. key, value: (B, G, S, D).
        """
        keys, values = self.keys_values(attention, query)
        if self.convention == "prefix":
            K, T, S = keys.shape[2], query.shape[2], key.shape[2]
            if mask is None and T > 1 and base.__name__ == "sdpa_attention_forward":  # it reads None as causal
                mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril()[None, None]
            if mask is not None:  # every word attends to the whole prompt
                mask = F.pad(mask, (K, 0), value=True if mask.dtype == torch.bool else 0.0)
            words, weights = base(
                attention, query, torch.cat([keys, key], 2), torch.cat([values, value], 2), mask, **kwargs
            )
            return words, None if weights is None else weights[..., K:]
        words, weights = base(attention, query, key, value, mask, **kwargs)
        kept = {name: kwargs[name] for name in ("scaling", "softcap") if name in kwargs}
        term, _ = base(attention, query, keys, values, None, is_causal=False, **kept)
        return words + gate_factor(self.gate, self.convention).to(words.dtype)[:, None] * term, weights


def register_attention(implementation: str) -> None:
    """Register the attention function over `implementation`, with that implementation's masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        kind: Any = type(module)
        base = _own_attention(kind, implementation)
        if (adaption := getattr(module, "adaption", None)) is None:
            return base(module, query, key, value, attention_mask, **kwargs)
        return adaption(base, module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(PREFIX + implementation, attend)
    AttentionMaskInterface.register(PREFIX + implementation, ALL_MASK_ATTENTION_FUNCTIONS[implementation])


@lru_cache
def _own_attention(kind: Any, implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that attention modules of the class `kind` call; eager's stands in the class's file."""
    names = inspect.unwrap(kind.forward).__globals__
    return names["ALL_ATTENTION_FUNCTIONS"].get_interface(implementation, names["eager_attention_forward"])
