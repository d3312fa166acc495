"""Errors that a user can correct: each ends a command with one message and exit code 2, without a traceback.

A message says what is wrong, with the value; which setting or file; and what to do. Any other exception is a fault of
this program and keeps its traceback.
"""

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
"""The exceptions that a command reports in one message. Those of the system name a path, or a host without an answer.
Any other OSError, such as a closed file's, is a fault; a full disk is a StorageError."""
