"""Errors that a user can correct: each ends a command with one message and exit code 2, without a traceback.

A message says what is wrong, with the value; which setting or file; and what to do. Any other exception is a fault of
this program and keeps its traceback.
"""

import errno
import socket

from adapter.errors import AdapterError
from cafo.errors import CafoError


class UserError(ValueError):
    """Base class of the errors about a user's settings, data, files or cluster."""


class ConfigError(UserError):
    """Settings that are unknown, of the wrong type, out of range or contradictory; one line for each."""


class DataError(UserError):
    """Records, images, labels, splits or files that cannot be used."""


class ProvenanceError(UserError):
    """A run folder or cache whose content was made with other settings or data than those now given."""


class ResourceError(UserError):
    """Workers that can never fit into the cluster, or a run that another process holds."""


class LeaseLostError(ResourceError):
    """A run folder that another process has taken over from this one."""


class StorageError(UserError, OSError):
    """A path or URL that cannot be reached, read or written."""


class NonFiniteLossError(UserError):
    """A training loss that became infinite or NaN."""


USER_ERRORS = (
    UserError,
    AdapterError,
    CafoError,
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    ConnectionError,
    TimeoutError,
    socket.gaierror,
)
"""Exceptions that a command reports in one message. Those of the system name a path, or a host without an answer."""

_SYSTEM_LIMITS = {
    errno.EDQUOT,
    errno.EIO,
    errno.ELOOP,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ENFILE,
    errno.ENOSPC,
    errno.EROFS,
}


def describe_error(error: BaseException) -> str:
    """The message of an error for a user: of one of the system `path: reason`, of any other its own text."""
    if isinstance(error, OSError) and error.errno and error.filename and error.strerror:
        paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
        return f"{' to '.join(paths)}: {error.strerror[0].lower()}{error.strerror[1:]}"
    return str(error) or type(error).__name__


def is_user_error(error: BaseException) -> bool:
    """Return whether a command reports this error in one message.

    Besides `USER_ERRORS` these are limits of a system without an exception class, such as a full disk. Any other
    OSError, such as that of a closed file, is a fault of this program.
    """
    return isinstance(error, USER_ERRORS) or (isinstance(error, OSError) and error.errno in _SYSTEM_LIMITS)
