"""Settings of sampling answers. Importing this module imports no PyTorch, so that configs can name it."""

import math
from dataclasses import dataclass

from adapter.errors import AdapterError


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of sampling answers, and their maximum length. The defaults are those of LLaMA-Adapter's code."""

    max_new_tokens: int = 256
    """Maximum number of tokens in an answer."""
    temperature: float = 0.1
    """Sampling temperature; 0 takes the likeliest token (greedy), whatever `top_p`."""
    top_p: float = 0.75
    """Sample from the smallest set of likeliest tokens whose probabilities sum to at least this."""
    seed: int | None = 0
    """Sampling seed; None samples with torch's global generator."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise AdapterError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise AdapterError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise AdapterError(f"top_p must be in (0, 1], got {self.top_p}")
