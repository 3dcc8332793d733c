"""The ledger: one transactional database that is the queue and the write-ahead log."""

from everstep.ledger.directory import CheckpointQuery, SessionQuery, Span, Stored
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
    Event,
    Failure,
    NewOperation,
    Operation,
    Run,
    Sampler,
    Session,
    WeightsToken,
    as_texts,
)

__all__ = [
    "Backlog",
    "Checkpoint",
    "CheckpointQuery",
    "Event",
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
    "SessionQuery",
    "Span",
    "Stored",
    "WeightsToken",
    "as_texts",
]
