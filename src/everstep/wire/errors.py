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
    """Whose fault a failed operation is; also under the official SDK's names."""

    USER = "user"
    SERVER = "server"
    UNKNOWN = "unknown"
    User = "user"
    Server = "server"
    Unknown = "unknown"


class WireError(ValueError):
    """Base of the errors of this room."""


class InvalidRequest(WireError):
    """A request body that can't be read.

    Attributes:
        model_id: the run that the request is for, where that much could be read.
        seq_id: the request's place in that run; so the failure can be put there.
    """

    def __init__(
        self, message: str, *, model_id: str | None = None, seq_id: int | None = None
    ) -> None:
        super().__init__(message)
        self.model_id = model_id
        self.seq_id = seq_id


class InvalidPath(WireError):
    """A text that is not a tinker:// path of a checkpoint."""


class InvalidName(WireError):
    """A name that breaks the rule for names."""


class BodyTooLarge(WireError):
    """A request body over the limit.

    Attributes:
        head: its first bytes, decompressed, as far as there are any: they may tell whose it is.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.head = b""
