"""Settings of decoding answers."""

from typing import Literal

from pydantic import Field

from adapter.generation_config import GenerationConfig
from rayjobs.config import config

Reading = Literal["generate", "likelihood", "normalised"]
"""The way a problem of ScienceQA is answered: by a generated text, by the option whose answer has the highest
likelihood, or by the option whose own text has the highest likelihood per byte."""


@config
class DecodingConfig(GenerationConfig):
    """Decoding settings; the defaults are those of LLaMA-Adapter."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Maximum number of tokens of an answer."""
    temperature: float = Field(default=0.1, ge=0)
    """Sampling temperature; 0 is greedy decoding."""
    top_p: float = Field(default=0.75, gt=0, le=1)
    """Sample from the most likely tokens whose probabilities add up to this."""
    seed: int = Field(default=0, ge=0)
    """Sampling seed."""


@config
class GreedyDecodingConfig(DecodingConfig):
    """Decoding settings of answers that are measured."""

    temperature: float = Field(default=0, ge=0)
    """Sampling temperature; 0 is greedy decoding."""
