"""The ledger: one transactional database that is the queue and the write-ahead log."""

from everstep.ledger.errors import (
    LedgerDamaged,
    LedgerError,
    LedgerLocked,
    LedgerTooNew,
    NotWritten,
    SequenceConflict,
)
from everstep.ledger.ledger import Ledger
from everstep.ledger.records import (
    Backlog,
    Checkpoint,
    Failure,
    NewOperation,
    Operation,
    Run,
    Sampler,
    Session,
)

__all__ = [
    "Backlog",
    "Checkpoint",
    "Failure",
    "Ledger",
    "LedgerDamaged",
    "LedgerError",
    "LedgerLocked",
    "LedgerTooNew",
    "NewOperation",
    "NotWritten",
    "Operation",
    "Run",
    "Sampler",
    "SequenceConflict",
    "Session",
]
