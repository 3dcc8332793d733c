"""Errors: raised by the runtime.

RuntimeFault
├── Rejected          a request is refused: an HTTP status and a text
├── UnknownFuture     no operation has the request id
├── WorkerLost        the worker ended before it replied
├── RunUnavailable    this service can't bring the run back. The run waits
└── RunCorrupted      the run can't be brought back bit for bit

`OperationFailed`, `OutOfMemory`, `VaultUnreachable` and `RequestUnreadable` are shared with the
worker (`worker.protocol.errors`).
"""

from __future__ import annotations

from everstep.worker.protocol.errors import (
    OperationFailed,
    OutOfMemory,
    RequestUnreadable,
    VaultUnreachable,
)

__all__ = [
    "OperationFailed",
    "OutOfMemory",
    "Rejected",
    "RequestUnreadable",
    "RunCorrupted",
    "RunUnavailable",
    "RuntimeFault",
    "UnknownFuture",
    "VaultUnreachable",
    "WorkerLost",
]


class RuntimeFault(Exception):
    """Base of the runtime's errors."""


class Rejected(RuntimeFault):
    """A request was refused before anything was accepted.

    Attributes:
        status: the HTTP status that fits (4xx).
        detail: the problem, the input that caused it, and the remedy.
        retry_after: seconds after which a retry may succeed, or None if it does not help.
    """

    def __init__(self, status: int, detail: str, *, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.retry_after = retry_after


class UnknownFuture(RuntimeFault):
    """No operation with this request id was ever accepted here."""


class WorkerLost(RuntimeFault):
    """The worker ended before it replied. The call may be sent again.

    Attributes:
        reason: how the worker ended.
        blamed: whether it was executing this call, or writing its files.
        killed: whether someone outside killed it, as far as can be known.
    """

    def __init__(self, reason: str, *, blamed: bool = False, killed: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.blamed = blamed
        self.killed = killed


class RunUnavailable(RuntimeFault):
    """This service can't bring the run back. The run waits, and nothing is lost."""


class RunCorrupted(RuntimeFault):
    """The run can't be brought back to its recorded results. The text names the difference."""
