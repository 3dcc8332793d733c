"""Gaps: refuse sequence ids that are too far ahead, and fail those that a client skipped.

Chunks of the official SDK arrive in any order, so by default a gap waits (`run_actor`). A client
that sends one request at a time never fills a gap: the missing operation was never sent, or was
given up. Such a gap is closed at once, so that later operations don't wait for it.
"""

from __future__ import annotations

from everstep.ledger import Failure, Ledger, NewOperation, Operation
from everstep.runtime import ids
from everstep.runtime.errors import Rejected
from everstep.wire.errors import ErrorCategory

MAX_SEQ_ID_LOOKAHEAD = 10_000


async def check_not_far_ahead(ledger: Ledger, new: NewOperation, position: int) -> None:
    """Check that a client can have reached a sequence id by counting.

    Args:
        ledger: holds the operations.
        new: an operation.
        position: the sequence id of the last operation of its scope that is known to be executed,
            or -1. It counts from the start again while a run is brought back.

    Raises:
        Rejected: no client can (400).
    """
    after = new.seq_id - MAX_SEQ_ID_LOOKAHEAD - 1
    if after < 0 or after < position:
        return
    if not await ledger.operations(new.scope, after=after, limit=1, contents=False):
        raise Rejected(
            400,
            f"seq_id {new.seq_id} is too far ahead: none of the {MAX_SEQ_ID_LOOKAHEAD} before it "
            "were used. Sequence ids count up by one.",
        )


async def skip_gap(ledger: Ledger, new: NewOperation) -> list[Operation]:
    """Record a failed operation for each unused sequence id right before a new operation.

    A gap after a forward stays open: the client may still send the backward of a loss that it
    computes itself.

    Args:
        ledger: holds the operations.
        new: an operation of a client that sends one request at a time.

    Returns:
        The failed operations.

    Raises:
        SessionFinished: the operation's session has ended.
    """
    before = await ledger.previous_operation(new.scope, new.seq_id)
    if before is None or before.kind == ids.FORWARD:
        return []
    skipped = []
    for seq_id in range(before.seq_id + 1, new.seq_id):
        failure = Failure(
            f"Operation {seq_id} of {new.scope} did not come before operation {new.seq_id}, from a "
            "client that sends them in order; it is not executed any more.",
            ErrorCategory.USER,
        )
        missing = NewOperation(new.scope, seq_id, ids.MISSING, b"", failure, new.session_id)
        skipped.append((await ledger.accept(missing, open_session=True))[0])
    return skipped
