"""What is wrong on the wire.

WireError (ValueError)
├── InvalidRequest    a body that can't be read; names the field
├── InvalidPath       not a tinker:// path
├── InvalidName       a checkpoint name or run id that breaks the rule
└── BodyTooLarge      more bytes than the limit, before or after decompression
"""

from __future__ import annotations

from enum import StrEnum


class ErrorCategory(StrEnum):
    """Whose fault a failed operation is."""

    USER = "user"
    SERVER = "server"
    UNKNOWN = "unknown"


class WireError(ValueError):
    """Base of the errors of this room."""


class InvalidRequest(WireError):
    """A request body that can't be read."""


class InvalidPath(WireError):
    """A text that is not a tinker:// path of a checkpoint."""


class InvalidName(WireError):
    """A name that breaks the rule for names."""


class BodyTooLarge(WireError):
    """A request body over the limit."""
