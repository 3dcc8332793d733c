"""Gaps that clients leave who send a run's operations one after the other.

Chunks of the official SDK arrive in any order, so a gap waits (`run_actor`). A client that sends
nothing before the last request was answered leaves a gap for ever: what it left out was never sent,
or was given up. Such a gap is closed at once, so that what comes after it doesn't wait.
"""

from __future__ import annotations

from everstep.ledger import Failure, Ledger, NewOperation, Operation
from everstep.runtime import names
from everstep.wire.errors import ErrorCategory


async def skip_gap(ledger: Ledger, new: NewOperation) -> list[Operation]:
    """Put failed operations into the places right before a new one that nobody will take.

    After a forward they stay free: they may be for the backward of a loss that the client is
    computing meanwhile.

    Args:
        ledger: where the places are.
        new: what such a client sent.

    Returns:
        The failed operations.
    """
    before = await ledger.place_before(new.scope, new.seq_id)
    if before is None or before.kind == names.FORWARD:
        return []
    skipped = []
    for seq_id in range(before.seq_id + 1, new.seq_id):
        failure = Failure(
            f"Operation {seq_id} of {new.scope} did not come before operation {new.seq_id}, from a "
            "client that sends them in order; it is not executed any more.",
            ErrorCategory.USER,
        )
        missing = NewOperation(new.scope, seq_id, names.MISSING, b"", failure, new.session_id)
        skipped.append((await ledger.accept(missing))[0])
    return skipped
