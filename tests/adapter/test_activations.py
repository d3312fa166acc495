"""What a micro-batch leaves in memory for its backward pass: the bytes that docs/cluster.md reckons with."""

import pytest
import torch
from torch import Tensor

from adapter.adaption import AdaptionConfig
from adapter.decoder import Decoder, RMSNorm
from adapter.decoder_config import DecoderConfig

DIM, ROWS, TOKENS = 256, 2, 256


def saved_bytes(dtype: torch.dtype, adapted: int, checkpointed: bool) -> int:
    """Bytes that autograd saves, parameters left out, each storage once. As in LLaMA: D = 128, 2.69 C inside."""
    config = DecoderConfig(dim=DIM, n_layers=6, n_heads=2, n_kv_heads=2, hidden_dim=DIM * 43 // 16, vocab_size=97)
    model = Decoder(config)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.reset_parameters()
    model.to(dtype).add_adapter(AdaptionConfig(n_layers=adapted, prompt_length=10))
    model.checkpoint_activations = checkpointed
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(3, 97, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, tokens)
    assert loss.requires_grad
    return sum(found.values())


@pytest.mark.parametrize(
    ("dtype", "checkpointed", "expected"),
    [
        (torch.bfloat16, False, 22.8),
        (torch.bfloat16, True, 2.0),
        (torch.float32, False, 49.6),
        (torch.float32, True, 4.0),
    ],
)
def test_bytes_for_each_token_adapted_layer_and_unit_of_width(
    dtype: torch.dtype, checkpointed: bool, expected: float
) -> None:
    # a difference, because the lowest adapted layer keeps less
    more = saved_bytes(dtype, 5, checkpointed) - saved_bytes(dtype, 2, checkpointed)
    assert more / (3 * ROWS * TOKENS * DIM) == pytest.approx(expected, rel=0.01)
