"""Absence: refusals of requests for runs, sessions and samplers that are not there."""

from __future__ import annotations

from everstep.ledger import Ledger
from everstep.ledger.deletion import describe
from everstep.runtime.errors import Rejected


async def absent(ledger: Ledger, key: str | None, text: str) -> Rejected:
    """Build the refusal (404) of a request for something that is not there.

    Args:
        ledger: knows what was deleted.
        key: the run, session or sampler that was asked for.
        text: the message, unless it was deleted: then the message says so, and when.
    """
    tombstone = await ledger.deletions.find(key) if key else None
    return Rejected(404, text if tombstone is None or not key else describe(tombstone, key))
