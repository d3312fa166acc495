"""Errors that a user can put right: they end a command with one message and exit code 2, without a traceback.

Each message says what is wrong, where, and what to do. Any other exception is a fault of this program and keeps its
traceback.
"""

from adapter.errors import AdapterError
from cafo.errors import CafoError


class UserError(ValueError):
    """Base class of the errors about what a user gave: settings, data, files, a cluster."""


class ConfigError(UserError):
    """Settings that are unknown, of the wrong type, out of range or in contradiction, one line each."""


class DataError(UserError):
    """Records, images, labels or splits that cannot be used."""


class ProvenanceError(UserError):
    """A run folder or cache that was made with other settings or data than those of this command."""


class ResourceError(UserError):
    """Workers that the cluster can never hold."""


class StorageError(UserError, OSError):
    """A path or URL that cannot be reached, read or written."""


class NonFiniteLossError(UserError):
    """A training loss that became infinite or NaN."""


USER_ERRORS = (UserError, AdapterError, CafoError, OSError)
"""What a command reports in one message. OSError is the system's own: a missing file, a full disk, no permission."""
