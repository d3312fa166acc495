"""Compute how much memory a frozen base takes, from its shape alone."""

import torch

from adapter.base.binding import meta_decoder
from adapter.base.quantization import Quantization, is_quantizable, quantized_bytes
from adapter.decoder_config import DecoderConfig


def base_bytes(config: DecoderConfig, dtype: torch.dtype, quantization: Quantization | None = None) -> int:
    """Bytes of the base's weights, held as `load_decoder` holds them under the same dtype and quantization."""
    model = meta_decoder(config)
    return sum(
        quantized_bytes(parameter.shape, quantization)
        if quantization and is_quantizable(model, name)
        else parameter.numel() * dtype.itemsize
        for name, parameter in model.named_parameters()
    )
