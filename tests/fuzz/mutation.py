"""Damage files: single bytes, tokens of text, values of JSON and YAML, the headers and members of containers."""

import bz2
import gzip
import io
import json
import pickle
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 20
"""Longer results of a mutation are cut off, so that an input stays one that can be written in milliseconds."""

DEEP = "@deep@"
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**400),
    *(0.0, -0.0, 0.5, 1.5, 1e-300, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", " ", "a", "0", "-1", "1e5", "nan", "null", "true", "a" * 5000, "é", "\ud800", "\x00", "\n", "\u2028", "🙂"),
    *("..", "../../outside", "/etc/passwd", "a/b", "~", "file:///etc/passwd", "s3://b/k", "hf://datasets/o/n", "C:\\x"),
    *("{}", "[]", "{{ x }}", "{% raw %}", "%s", "{0}", "{instruction}", "<image>", "llama", "LORA"),
    *([], {}, [[]], [None], [0], [1, 2, 3], ["a"], [{}], {"": None}, {"a": 1}, {"a": {"b": []}}, [[1, 2], [3]], DEEP),
)
"""Values that take the place of others."""


class Harmful:
    """An object whose pickle would start a program when it is read."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        import os

        return os.system, ("true",)


WHOLE = (
    *(b"", b"\n", b"\0", b"{}", b"[]", b"null", b"0", b'""', b"[[", b'{"a":', b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}"),
    *(b"<!DOCTYPE html><html></html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    *(
        b"GGUF",
        b"PAR1",
        b"ARROW1\0\0",
        b"PK\x03\x04",
        b"PK\x05\x06" + bytes(18),
        b"\x1f\x8b\x08\0",
        b"\x28\xb5\x2f\xfd",
    ),
    *(pickle.dumps(Harmful(), protocol=p) for p in (0, 2, 4)),
    *(b"[" * 100_000, b'{"a":' * 100_000, gzip.compress(bytes(1 << 20)), bz2.compress(b"a" * 1000)),
)
"""Contents that take the place of a file's: of other kinds, and bombs."""

YAML = (
    *("a: &a [*a]", "- *b", "!!python/object/apply:os.system ['true']", "!!binary aGk=", "!!set {a, b}", "? [a]\n: b"),
    *("<<: 1", "<<: {a: 1}", "a: 1\na: 2", "---\n---", "...", "%YAML 9.9", "\t- a", "!!timestamp 9999-99-99", "&a : b"),
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e,*e]",
    "\n".join(["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{f'*a{i - 1},' * 9}]}}" for i in range(1, 12))]),
    *("a: " + "[" * 100_000, "- " * 100_000, '{"a":' * 100_000),
    *(
        "1_000",
        "0x1F",
        "0o17",
        "1:30",
        ".inf",
        "-.nan",
        "2026-01-01",
        "yes",
        "~",
        "|",
        ">",
        "@a",
        "`a`",
        "{a: }",
        "[a, ",
    ),
)
_NUMBERS = (
    b"0",
    b"-1",
    b"1",
    b"99999999999999999999",
    b"1e999",
    b"NaN",
    b"-0",
    b"0.1",
    b"007",
    b"\xd9\xa3",
    b"2147483648",
)
_TOKEN = re.compile(rb"\w+|[^\w\s]")


def mutate(content: bytes, name: str, rng: random.Random) -> bytes:
    """Return the content of a file with one to four changes, of a kind that suits it, or of any kind.

    name: the file's name, which says what it holds.
    """
    if rng.random() < 0.03:
        return rng.choice(WHOLE)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        kinds = [_bytes, _tokens] if _is_text(content) else [_bytes]
        kinds += _fitting(content, name)
        content = rng.choice(kinds)(content, rng)[:MOST_BYTES]
    return content


def _is_text(content: bytes) -> bool:
    return b"\0" not in content[:1000]


def _fitting(content: bytes, name: str) -> list[Callable[[bytes, random.Random], bytes]]:
    """The mutations of a file's own kind, more than once, since they get furthest."""
    if name.endswith((".gz", ".zst")):
        return [_packed] * 3
    if content[:2] == b"PK":
        return [_members] * 2
    if content[8:9] == b"{" and int.from_bytes(content[:8], "little") <= len(content):
        return [_safetensors] * 4
    if name.endswith((".yaml", ".yml")):
        return [_yaml] * 3
    if content.lstrip(b"\xef\xbb\xbf \n")[:1] in (b"{", b"["):
        return [_json] * 6
    return []


def _bytes(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    stop = min(len(content), start + rng.choice((1, 1, 2, 4, 8, 64, 1000)))
    before, chosen, after = content[:start], content[start:stop], content[stop:]
    match rng.randrange(8):
        case 0:  # one bit
            return before + bytes([chosen[0] ^ (1 << rng.randrange(8))]) + chosen[1:] + after if chosen else content
        case 1:
            return before + bytes(rng.randrange(256) for _ in range(min(8, len(chosen)))) + chosen[8:] + after
        case 2:
            return before + after
        case 3:
            return before + chosen * rng.choice((2, 3, 100)) + after
        case 4:
            return before
        case 5:  # a number
            size = rng.choice((1, 2, 4, 8))
            number = rng.choice(
                (0, 1, 2, 127, 128, 255, 1 << 16, 1 << 31, (1 << 31) - 1, 1 << 40, 1 << 63, (1 << 64) - 1)
            )
            return before + (number % (1 << 8 * size)).to_bytes(size, "little") + content[start + size :]
        case 6:  # another part of the file
            other = rng.randrange(len(content) + 1)
            return before + content[other : other + len(chosen)] + after
        case _:
            return (
                before
                + rng.choice((b"\0", b"\xff", b"\xef\xbb\xbf", b"\r\n", b'"', b"\\", b"{", b"]", b","))
                + chosen
                + after
            )


def _tokens(content: bytes, rng: random.Random) -> bytes:
    tokens = list(_TOKEN.finditer(content[:100_000]))
    if not tokens:
        return content
    token, other = rng.choice(tokens), rng.choice(tokens)
    new = rng.choice((b"", token[0] * 2, other[0], rng.choice(_NUMBERS), _text(rng.choice(ODD))))
    if rng.random() < 0.1:
        lines = content.splitlines(keepends=True)
        rng.shuffle(lines)
        return b"".join(lines)
    return content[: token.start()] + new + content[token.end() :]


def _text(value: Any) -> bytes:
    return str(value)[:6000].encode("utf-8", "surrogatepass")


def _json(content: bytes, rng: random.Random) -> bytes:
    """Change a value; of lines of JSON, one in one of the lines."""
    lines = content.split(b"\n")
    try:
        return dump(change_value(json.loads(content), rng), rng)
    except (ValueError, RecursionError):
        at = rng.randrange(len(lines))
    try:
        lines[at] = dump(change_value(json.loads(lines[at]), rng), rng)
    except (ValueError, RecursionError):
        return _tokens(content, rng)
    return b"\n".join(lines)


def dump(value: Any, rng: random.Random) -> bytes:
    """JSON, in which `DEEP` becomes brackets without number."""
    deep = rng.choice((400, 100_000))
    return json.dumps(value).replace(f'"{DEEP}"', "[" * deep + "]" * deep).encode()


def change_value(value: Any, rng: random.Random) -> Any:
    """Replace, drop, double, rename or move a value somewhere in nested lists and objects."""
    places: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        holder = pending.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in list(keys)[:200]:
            places.append((holder, key))
            if isinstance(holder[key], dict | list):
                pending.append(holder[key])
    if not places or rng.random() < 0.02:
        return rng.choice(ODD)
    holder, key = rng.choice(places)
    match rng.randrange(7):
        case 0:
            del holder[key]
        case 1:
            source, other = rng.choice(places)
            with_key = (isinstance(source, dict) and other in source) or (
                isinstance(source, list) and other < len(source)
            )
            holder[key] = json.loads(json.dumps(source[other])) if with_key else None
        case 2 if isinstance(holder, list):
            holder.insert(key, json.loads(json.dumps(holder[key])))
        case 2:
            holder[str(rng.choice(ODD))[:100]] = holder.pop(key)
        case 3:
            holder[key] = [holder[key]]
        case 4:
            holder[key] = str(holder[key])
        case _:
            holder[key] = json.loads(json.dumps(rng.choice(ODD)))
    return value


def _yaml(content: bytes, rng: random.Random) -> bytes:
    lines = content.decode("utf-8", "replace").split("\n")
    at, odd = rng.randrange(len(lines)), rng.choice(YAML)
    key, colon, _ = lines[at].partition(":")
    match rng.randrange(5):
        case 0:
            lines[at] = odd
        case 1 if colon:
            lines[at] = f"{key}: {odd}"
        case 2 if colon:
            value = rng.choice(ODD)
            lines[at] = f"{key}: {dump(value, rng).decode()}" if rng.random() < 0.9 else f"{key}: {value}"
        case 3:
            lines[at] = " " * rng.randrange(9) + lines[at].lstrip()
        case _:
            lines.insert(at, rng.choice(lines))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _safetensors(content: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + size], content[8 + size :]
    match rng.randrange(4):
        case 0:
            return content[:8] + header + _bytes(rest, rng)
        case 1:
            header = _tokens(header, rng)
        case _:
            header = _metadata(header, rng) if rng.random() < 0.6 else _json(header, rng)
    return len(header).to_bytes(8, "little") + header + rest


def _metadata(header: bytes, rng: random.Random) -> bytes:
    """Change one of the texts of the header's metadata, which may be JSON itself."""
    try:
        values = json.loads(header)
        texts = values["__metadata__"]
        key = rng.choice(list(texts))
        if texts[key][:1] in ("{", "["):
            texts[key] = _json(texts[key].encode(), rng).decode("utf-8", "replace")
        elif rng.random() < 0.2:
            del texts[key]
        else:
            texts[key] = str(rng.choice(ODD))[:1000]
        return json.dumps(values).encode()
    except (ValueError, LookupError, TypeError, RecursionError):
        return _json(header, rng)


def _members(content: bytes, rng: random.Random) -> bytes:
    """Change one member of a zip archive, as PyTorch's files are, and store all of them as they were."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
    except Exception:  # damaged by an earlier change
        return _bytes(content, rng)
    if not members:
        return _bytes(content, rng)
    pickles = [name for name in members if name.endswith(".pkl")]
    name = rng.choice(pickles or list(members)) if rng.random() < 0.8 else rng.choice(list(members))
    harmful = rng.random() < 0.1
    members[name] = pickle.dumps(Harmful(), protocol=2) if harmful else _bytes(members[name], rng)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return out.getvalue()


def _packed(content: bytes, rng: random.Random) -> bytes:
    """Change what a compressed file holds."""
    import pyarrow as pa

    kind = "gzip" if content[:2] == b"\x1f\x8b" else "zstd"
    try:
        with pa.input_stream(pa.BufferReader(content), compression=kind) as stream:
            inner = stream.read(MOST_BYTES)
    except (OSError, pa.ArrowException):
        return _bytes(content, rng)
    inner = mutate(inner, Path("inner.jsonl").name, rng)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, kind) as stream:
        stream.write(inner)
    return sink.getvalue().to_pybytes()
