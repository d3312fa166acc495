"""Errors that a user can put right. Each message says what is wrong, where, and what to do."""


class CafoError(ValueError):
    """Base class of this library's errors about what a user gave: files, settings, images, prompts."""


class DatasetError(CafoError):
    """A data set whose layout, split or labels cannot be used."""


class EncoderError(CafoError):
    """An image encoder that does not exist, or whose weights cannot be read or do not fit."""


class ImageError(CafoError):
    """An image that cannot be read."""
