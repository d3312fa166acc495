"""Credentials in URLs, settings and texts: wherever one of them is written or shown, they are masked."""

import os
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
_QUERY = re.compile(
    rf"([?&](?:[\w.\-]*(?:{_SECRET})[\w.\-]*|key|auth|code|sas)=)[^&#\s'\"]+",  # key is what Google calls its own
    re.IGNORECASE,
)
_NAME = r"(?:[\w.\-]*[_.\-])?(?:api_?key|access_?key|secret_?key|secret|password|passwd|token|authorization)"
_NAMES = re.compile(_NAME, re.IGNORECASE)
_VALUE = r"(?:'[^']*'|\"[^\"]*\"|[^\s'\",}]+)"
_ASSIGNED = re.compile(rf"((?<![\w.\-]){_NAME}=|['\"]{_NAME}['\"]:\s*(?=['\"])){_VALUE}", re.IGNORECASE)
_HEADER = re.compile(r"\b((?:Bearer|Basic)\s+)[\w.~+/=\-]{8,}", re.IGNORECASE)
_KEYS = re.compile(r"\b(?:(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abp]-)[\w\-]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16})\b")
"""Keys that their services let one recognize."""
_VARIABLES = re.compile(r"(?:^|_)(?:API_?KEY|ACCESS_KEY|SECRET_KEY|SECRET|TOKEN|PASSWORD|PASSWD)$", re.IGNORECASE)
_SHORTEST_SECRET = 8
"""Characters of a variable's value that is looked for in texts; a shorter one may be a common word."""


def mask_credentials(value: Any) -> Any:
    """The value with all credentials in it replaced by `***`; text, or plain values nested in any way.

    Credentials are those of URLs (`mask_url`); values that stand with a name such as `api_key`, `password` or `token`;
    keys after `Bearer`, and those of well-known forms; and the values of this process's environment variables whose
    names end with API_KEY, ACCESS_KEY, SECRET, TOKEN or PASSWORD.
    """
    if isinstance(value, str):
        return _mask_text(value)
    if isinstance(value, Mapping):
        return {
            name: MASK if inner and isinstance(inner, str) and _NAMES.fullmatch(str(name)) else mask_credentials(inner)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [mask_credentials(inner) for inner in value]
    return value


def mask_url(text: str) -> str:
    """A text with the credentials of the URLs in it masked, which takes no account of the environment.

    They are what stands before the host, `https://user:password@host`, and the values of query parameters such as
    `token`, `sig` and `X-Amz-Signature`.
    """
    return _QUERY.sub(rf"\1{MASK}", _USER.sub(rf"\1{MASK}@", text)) if "://" in text else text


def drop_mask(url: str) -> str:
    """A URL that was written masked, without the mask: its credentials are then those of the environment."""
    return url.replace(f"://{MASK}@", "://")


def _mask_text(text: str) -> str:
    text = _ASSIGNED.sub(rf"\1{MASK}", mask_url(text))
    text = _KEYS.sub(MASK, _HEADER.sub(rf"\1{MASK}", text))
    for name, secret in os.environ.items():
        if len(secret) >= _SHORTEST_SECRET and secret in text and _VARIABLES.search(name):
            text = text.replace(secret, MASK)
    return text
