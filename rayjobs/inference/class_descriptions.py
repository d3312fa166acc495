"""A LLaMA as CaFo's language model: it writes sentences about classes."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from adapter.adapter_checkpoint import read_adapter
from adapter.instruct import ALPACA, PromptTemplate
from adapter.model import AdaptedModel
from cafo.prompt import (
    Sampling,
    with_spaces,
)
from rayjobs.config import config
from rayjobs.models.base_model import BaseModelConfig
from rayjobs.storage.download import cached_path
from rayjobs.storage.fingerprint import file_fingerprint
from rayjobs.storage.paths import AnyPath, FileOrName


@config
class LlamaConfig:
    """A LLaMA on this machine."""

    base: BaseModelConfig
    adapter: AnyPath | None = None
    """An adapter file: ours, official v1, litgpt or PEFT; null asks the bare base."""
    template: FileOrName = "alpaca"
    """'alpaca', or a JSON file with 'with_input' and 'without_input' prompt templates."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest tokens that hold this much probability."""
    seed: int = Field(default=0, ge=0)
    """Of the draws."""
    batch_size: int = Field(default=64, ge=1)
    """Answers decoded together; all commands of a class share its batches."""

    def prompt_template(self) -> PromptTemplate:
        return ALPACA if self.template == "alpaca" else PromptTemplate.read(cached_path(self.template))

    def identity(self) -> dict[str, Any]:
        """What the answers depend on. Raises ValueError for a base, adapter or template that cannot be read."""
        checkpoint, tokenizer = self.base.open()
        if self.adapter is not None:
            read_adapter(cached_path(self.adapter))
        template = self.prompt_template()
        return {
            "base": checkpoint.fingerprint,
            "tokenizer": file_fingerprint(tokenizer),
            "dtype": self.base.dtype,
            "adapter": file_fingerprint(cached_path(self.adapter)) if self.adapter is not None else None,
            "template": [template.with_input, template.without_input],
            "top_p": self.top_p,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }


@config
class SamplingConfig:
    """How the answers of an endpoint or a LLaMA are drawn."""

    temperature: float = Field(default=0.99, ge=0)
    """High, so that ten answers are ten descriptions; 0 is greedy."""
    max_tokens: int = Field(default=50, ge=1)
    """The longest answer; CLIP's window holds 77 of its own tokens."""
    system: str = Sampling.system
    """What an endpoint is told before each command."""


class LlamaModel:
    """A `LanguageModel` on this machine: the first command about a class decodes its answers to all of them."""

    def __init__(
        self, base: AdaptedModel, settings: LlamaConfig, sampling: SamplingConfig, commands: Sequence[str]
    ) -> None:
        self._base, self._settings, self._sampling = base, settings, sampling
        self._commands, self._template = list(dict.fromkeys(commands)), settings.prompt_template()
        self._decoded: tuple[tuple[str, int] | None, dict[str, list[str]]] = (None, {})

    def describe(self, class_name: str, command: str, n: int) -> list[str]:
        """`n` answers to the command as an instruction; they depend on nothing that was asked before."""
        if self._decoded[0] != (class_name, n):
            self._decoded = ((class_name, n), self._decode(class_name, n))
        return self._decoded[1][command]

    def _decode(self, class_name: str, n: int) -> dict[str, list[str]]:
        asked = [command for command in self._commands for _ in range(n)]
        prompts = [self._template.render(command.format(with_spaces(class_name))) for command in asked]
        told: dict[str, list[str]] = {command: [] for command in self._commands}
        size = self._settings.batch_size
        for start in range(0, len(prompts), size):
            texts = self._base.generate(
                prompts[start : start + size],
                max_new_tokens=self._sampling.max_tokens,
                temperature=self._sampling.temperature,
                top_p=self._settings.top_p,
                # Equal prompts of one batch draw apart by themselves; those of two batches need two seeds.
                seed=self._settings.seed * 1_000_003 + start,
            )
            for command, text in zip(asked[start : start + size], texts, strict=True):
                told[command].append(text.strip())
        return told
