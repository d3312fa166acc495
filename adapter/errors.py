"""Errors that a user can put right. Each message says what is wrong, where, and what to do."""


class AdapterError(ValueError):
    """Base class of this library's errors about what a user gave: files, settings, records, prompts."""


class CheckpointError(AdapterError):
    """A base or adapter checkpoint that cannot be read, or that does not fit."""


class TokenizerError(AdapterError):
    """A tokenizer that cannot be read, or that does not fit the model."""


class RecordError(AdapterError):
    """A record that cannot be used for training or evaluation."""
