"""Credentials in URLs: wherever a URL is written or shown, they are masked."""

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

_USER = re.compile(
    r"(?<![\w+.\-])([A-Za-z][\w+.\-]*://)"
    r"(?:[^/?#@\s'\":]*:(?!\d+/)[^@\s'\"]*"  # user:password, in which secret keys of AWS have slashes; no port
    r"|[^/?#@\s'\"]*)"
    r"(?:@[^/?#@\s'\"]*)*@"
)
_SECRET = r"token|signature|sig|secret|password|passwd|pwd|api[_-]?key|access[_-]?key|credential"
_QUERY = re.compile(rf"([?&][\w.\-]*(?:{_SECRET})[\w.\-]*=)[^&#\s'\"]+", re.IGNORECASE)


def mask_credentials(value: Any) -> Any:
    """The value with the credentials of all URLs in it replaced by `***`; text, or plain values nested in any way.

    Credentials are what stands before the host, `https://user:password@host`, and the values of query parameters such
    as `token`, `sig` and `X-Amz-Signature`.
    """
    if isinstance(value, str):
        return _QUERY.sub(rf"\1{MASK}", _USER.sub(rf"\1{MASK}@", value)) if "://" in value else value
    if isinstance(value, Mapping):
        return {name: mask_credentials(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [mask_credentials(inner) for inner in value]
    return value


def drop_mask(url: str) -> str:
    """A URL that was written masked, without the mask: its credentials are then those of the environment."""
    return url.replace(f"://{MASK}@", "://")
