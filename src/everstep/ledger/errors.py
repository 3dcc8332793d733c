"""The ledger's exceptions.

LedgerError
├── LedgerLocked       another service has the home
├── LedgerTooNew       a newer release wrote the database
├── LedgerDamaged      the database does not hold the data that was written
├── SequenceConflict   a sequence id was reused for another request
├── SessionFinished    the session of a new operation has ended
├── Deleted            the run, session or sampler was deleted
├── InUse              the run or session can't be deleted now
├── QueueFull          requests of as many bytes wait already, a retry may be accepted
└── NotWritten         the database could not commit, so nothing was acknowledged
"""


class LedgerError(Exception):
    """Base of the ledger's errors."""


class LedgerLocked(LedgerError):
    """Another process has the ledger open."""


class LedgerTooNew(LedgerError):
    """The database has a schema that this release doesn't know."""


class LedgerDamaged(LedgerError):
    """The database does not hold the data that was written, or not all of it."""


class SequenceConflict(LedgerError):
    """The same sequence id was used before, with another request."""


class SessionFinished(LedgerError):
    """The session of a new operation has ended.

    Args:
        session_id: the session.
        reason: how it ended.
    """

    def __init__(self, session_id: str, reason: str | None) -> None:
        super().__init__(
            f"Session {session_id} is finished ({reason}) and takes no new operations. Open "
            "another one, and go on from a checkpoint."
        )


class NotWritten(LedgerError):
    """A commit failed, so nothing of it was acknowledged."""


class QueueFull(LedgerError):
    """As many bytes of requests wait as may. The client sends the request again.

    Args:
        scope: the run.
        queued: bytes that wait.
        limit: bytes that may wait.
    """

    def __init__(self, scope: str, queued: int, limit: int) -> None:
        super().__init__(
            f"{queued} bytes of requests of {scope} wait to be executed, and {limit} may "
            "(queue_bytes). Send this one again when some of them have ended."
        )


class Deleted(LedgerError):
    """The run, session or sampler was deleted. The text says when, and with what."""


class InUse(LedgerError):
    """The run or session can't be deleted now. The text says who uses it, and what to do."""
