"""Watch what a reader does beside reading: Python's audit events, processor time and memory."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayjobs.errors import is_user_error

CPU_SECONDS = 30.0
"""Longest time of one input, in seconds of this process's processors; a usual one takes milliseconds on any machine."""
MEMORY_BYTES = 1 << 30
"""Largest growth of this process by one input."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_FORBIDDEN = {
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "pickle.find_class"),
}
_CHANGES = {
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate", "os.utime"),
    *("shutil.rmtree", "shutil.move", "shutil.copyfile"),
}


class Misbehaviour(Exception):
    """A reader has done something that it must not do."""


class _Watch:
    hooked = False
    folder: str | None = None
    seen: list[str]
    others: set[int | None]
    """threads that lived before, such as one that keeps the lease of another test's run"""


_watch = _Watch()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch.folder is None or threading.get_ident() in _watch.others:
        return
    if event == "open":
        path, mode, flags = arguments
        if not isinstance(path, int) and (flags or 0) & _WRITES and not _is_inside(path):
            _watch.seen.append(f"opened {path!r} for writing (mode {mode})")
    elif event in _FORBIDDEN or (
        event in _CHANGES and not all(_is_inside(one) for one in arguments[:2] if isinstance(one, str | bytes | Path))
    ):
        _watch.seen.append(f"{event} {arguments!r:.200}")


def _is_inside(path: Any) -> bool:
    text = os.path.abspath(os.fsdecode(path))
    return f"{text}/".startswith((f"{_watch.folder}/", "/dev/null", "/proc/self/")) or "__pycache__" in text


def _memory(field: str) -> int:
    """Bytes of this process, now (VmRSS) or at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Raise Misbehaviour at the end if the block wrote outside `folder`, started or reached anything, or took long.

    An error that a command would report in one message goes through; any other becomes a Misbehaviour.
    """
    if not _watch.hooked:
        sys.addaudithook(_hook)
        _watch.hooked = True
    _watch.others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
    _watch.folder, _watch.seen = str(folder.absolute()), []
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory begins anew
    before, memory = time.process_time(), _memory("VmRSS")
    refused: BaseException | None = None
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        if not is_user_error(error):
            raise Misbehaviour(f"{type(error).__name__}: {error!s:.500}") from error
        refused = error
    finally:
        _watch.folder = None
    seconds = time.process_time() - before
    grown = _memory("VmHWM") - memory
    if _watch.seen:
        raise Misbehaviour(_watch.seen[0])
    if seconds > CPU_SECONDS:
        raise Misbehaviour(f"took {seconds:.1f} s of processor time")
    if grown > MEMORY_BYTES:
        raise Misbehaviour(f"took {grown >> 20} MB")
    if refused is not None:
        raise refused
