"""Failures of an operation, raised by the worker and by the runtime.

OperationFailed       an operation fails: a message and a category
├── VaultUnreachable  the vault's storage did not answer. A retry may succeed
└── OutOfMemory       the worker had not enough memory. A retry may succeed
RequestUnreadable     the worker can't read a request where it is stored
"""

from __future__ import annotations

from everstep.wire.errors import ErrorCategory


class OperationFailed(Exception):
    """An operation ends in a failed future.

    Attributes:
        message: the text the client sees.
        category: ``user`` if the request was wrong, ``server`` if the service was.
    """

    def __init__(self, message: str, category: ErrorCategory = ErrorCategory.USER) -> None:
        super().__init__(message)
        self.message = message
        self.category = category


class VaultUnreachable(OperationFailed):
    """The vault's storage did not answer. Nothing is known about the files in it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ErrorCategory.SERVER)


class OutOfMemory(OperationFailed):
    """The worker had not enough memory, of the host or of its device. Nothing has changed."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ErrorCategory.SERVER)


class RequestUnreadable(Exception):
    """The worker can't read a request where the service keeps it. Nothing was executed."""
