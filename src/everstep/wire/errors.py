"""Wire errors: exceptions for invalid requests, paths and names.

WireError (ValueError)
├── InvalidRequest    an invalid body, with the name of the field
├── InvalidPath       not a tinker:// path
├── InvalidName       an invalid checkpoint name or run id
└── BodyTooLarge      more bytes than the limit, before or after decompression
"""

from __future__ import annotations

from enum import StrEnum


class ErrorCategory(StrEnum):
    """The party at fault for a failed operation. Members also have the official SDK's names."""

    USER = "user"
    SERVER = "server"
    UNKNOWN = "unknown"
    User = "user"
    Server = "server"
    Unknown = "unknown"


class WireError(ValueError):
    """Base of the protocol's errors."""


class InvalidRequest(WireError):
    """A request body that can't be parsed.

    Attributes:
        model_id: the run that the request is for, where that could be parsed.
        seq_id: the request's sequence id in that run, under which its failure can be recorded.
    """

    def __init__(
        self, message: str, *, model_id: str | None = None, seq_id: int | None = None
    ) -> None:
        super().__init__(message)
        self.model_id = model_id
        self.seq_id = seq_id


class InvalidPath(WireError):
    """A string that is not a tinker:// path of a checkpoint."""


class InvalidName(WireError):
    """An invalid checkpoint name or run id."""


class BodyTooLarge(WireError):
    """A request body over the limit.

    Attributes:
        head: its first bytes, decompressed if possible. They may identify the run.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.head = b""
