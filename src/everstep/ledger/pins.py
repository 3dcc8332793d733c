"""Pins: the commands that are writing files to the vault, kept until their operations end.

A file that was put for a pinned command is named by no manifest yet. Garbage collection waits for
the pins that it finds (`everstep.runtime.maintenance.gc`), so that it removes none of these.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime

from sqlalchemy import Connection, delete, insert, select

from everstep.backoff import Backoff
from everstep.ledger import tables as t
from everstep.ledger.store import Store

_BACKOFF = Backoff(initial=0.02, max=0.5)


class Pins:
    """Records and removes pins. Durable when a call returns."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def add(self, pin: str) -> None:
        """Pin a command before it is sent to a worker. A pinned command stays pinned.

        Args:
            pin: the command's operation, by its request id: the transaction that ends the
                operation removes the pin. Of a command without an operation, any unique name.
        """
        await self._store.run(lambda connection: add(connection, pin))

    async def remove(self, *pins: str) -> None:
        """Remove pins of commands that have no operation, once they ended."""
        await self._store.run(lambda connection: remove(connection, *pins))

    async def active(self) -> frozenset[str]:
        """Return all pins."""
        return await self._store.read(
            lambda connection: frozenset(connection.scalars(select(t.pins.c.pin)))
        )

    async def wait(self, seconds: float) -> bool:
        """Wait until all present pins are removed. Later ones don't matter.

        Args:
            seconds: how long to wait at most.

        Returns:
            Whether they are all removed.
        """
        deadline = time.monotonic() + seconds
        attempt = 0
        waiting = await self.active()
        while waiting and time.monotonic() < deadline:
            await asyncio.sleep(_BACKOFF.delay(attempt))
            attempt += 1
            waiting &= await self.active()
        return not waiting

    async def clear(self) -> None:
        """Remove all pins: for the start of a service, when no worker holds a command of it.

        Unfinished commands are sent again, and pinned again before that.
        """
        await self._store.run(lambda connection: connection.execute(delete(t.pins)).rowcount)


def add(connection: Connection, pin: str) -> None:
    """Record a pin, once."""
    if connection.scalar(select(t.pins.c.pin).where(t.pins.c.pin == pin)) is None:
        connection.execute(insert(t.pins).values(pin=pin, created_at=datetime.now(UTC)))


def remove(connection: Connection, *pins: str) -> None:
    """Remove pins, if they are there."""
    connection.execute(delete(t.pins).where(t.pins.c.pin.in_(pins)))
