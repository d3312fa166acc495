"""Errors that a user can put right. Each message says what is wrong, where, and what to do."""


class CafoError(ValueError):
    """Base class of this library's errors about what a user gave: files, settings, images, prompts."""


class DatasetError(CafoError):
    """A data set whose layout, split or labels cannot be used."""


class EncoderError(CafoError):
    """An image encoder that does not exist, or whose weights cannot be read or do not fit."""


class ImageError(CafoError):
    """An image that cannot be read."""


def refuse_text(value: object, what: str) -> None:
    """Raise CafoError if a list was expected and text was given, which Python would take for a list of letters.

    Args:
        value: the argument.
        what: its name, and what it is a list of, such as `templates`.
    """
    if isinstance(value, str | bytes):
        raise CafoError(f"{what} should be a list, got the text {value[:60]!r}; put it in brackets: [{value[:60]!r}]")
