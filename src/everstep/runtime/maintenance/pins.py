"""Pins of saves: from before a save is sent to a worker until it is recorded, failed or lost."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable

from everstep.ledger import Ledger, LedgerError
from everstep.runtime.workers.base import Call
from everstep.worker.protocol.messages import RunSaved

_removals: set[asyncio.Task[None]] = set()


async def send_pinned(
    ledger: Ledger, request_id: str | None, send: Callable[[], Awaitable[Call[RunSaved]]]
) -> Call[RunSaved]:
    """Send a save whose files garbage collection leaves alone until it ends.

    Args:
        ledger: where it is pinned.
        request_id: the operation that it is for: the transaction that ends the operation removes
            the pin, and a save that is lost with its worker stays pinned until then. None for a
            snapshot, whose pin is removed when the worker replied or is lost.
        send: sends the save.
    """
    pin = request_id if request_id is not None else f"snapshot {uuid.uuid4().hex}"
    await ledger.pins.add(pin)
    try:
        call = await send()
    except BaseException:
        if request_id is None:
            await ledger.pins.remove(pin)
        raise
    if request_id is None:
        task = asyncio.create_task(_remove_after(call, ledger, pin), name=f"unpin {pin}")
        _removals.add(task)
        task.add_done_callback(_removals.discard)
    return call


async def _remove_after(call: Call[RunSaved], ledger: Ledger, pin: str) -> None:
    await asyncio.wait([call.done])
    try:
        await ledger.pins.remove(pin)
    except LedgerError:
        return  # the service is stopping; the next start removes all pins
