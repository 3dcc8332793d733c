"""What the runtime raises.

RuntimeFault
├── Rejected          a request that can't be attributed to a run: an HTTP status and a text
├── UnknownFuture     no operation has this request id
├── WorkerLost        the worker process ended while it held the call
├── RunUnavailable    the run can't be brought back as the service was started; it waits
├── RunCorrupted      the run can't be brought back, or not to the same bits
└── OperationFailed   an operation ended in a failure: a text and a category
    └── VaultUnreachable  the vault's store did not answer: it may succeed later
"""

from __future__ import annotations

from everstep.wire.errors import ErrorCategory


class RuntimeFault(Exception):
    """Base of everything the runtime raises on purpose."""


class Rejected(RuntimeFault):
    """A request was refused before anything was accepted.

    Attributes:
        status: the HTTP status that fits (4xx).
        detail: what was wrong, with which input, and what to do.
        retry_after: seconds after which it may be sent again, where that helps.
    """

    def __init__(self, status: int, detail: str, *, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.retry_after = retry_after


class UnknownFuture(RuntimeFault):
    """No operation with this request id was ever accepted here."""


class WorkerLost(RuntimeFault):
    """The worker process ended before it answered; the call may be made again.

    Attributes:
        reason: how it ended.
        blamed: whether it was executing this very call.
    """

    def __init__(self, reason: str, *, blamed: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.blamed = blamed


class RunUnavailable(RuntimeFault):
    """The run can't be brought back as the service was started; nothing is lost, it waits."""


class RunCorrupted(RuntimeFault):
    """The run can't be brought back to what was recorded; the text says where it differs."""


class OperationFailed(RuntimeFault):
    """An operation ends in a failed future.

    Attributes:
        message: the text the client sees.
        category: ``user`` when the request was wrong, ``server`` when we were.
    """

    def __init__(self, message: str, category: ErrorCategory = ErrorCategory.USER) -> None:
        super().__init__(message)
        self.message = message
        self.category = category


class VaultUnreachable(OperationFailed):
    """The store that the vault lies in did not answer: that says nothing of what lies there."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ErrorCategory.SERVER)
