"""What the ledger raises.

LedgerError
├── LedgerLocked       another service has the home
├── LedgerTooNew       a newer release wrote the database
├── LedgerDamaged      the database does not hold what was written
├── SequenceConflict   a sequence id was reused for another request
└── NotWritten         the database could not commit; nothing was acknowledged
"""


class LedgerError(Exception):
    """Base of the ledger's errors."""


class LedgerLocked(LedgerError):
    """Another process has the ledger open."""


class LedgerTooNew(LedgerError):
    """The database has a schema that this release doesn't know."""


class LedgerDamaged(LedgerError):
    """The database does not hold what was written, or not all of it."""


class SequenceConflict(LedgerError):
    """The same sequence id was used before, with another request."""


class NotWritten(LedgerError):
    """A commit failed, so that nothing of it was acknowledged."""
