"""Memory: rows of the ledger that one process holds, so that a request reads none of them again.

One process owns a home, so what it has read stays true until it writes. A row is kept when it was
read, and when its operation ended. It is dropped when a call wrote to its table. Both happen once
the call is durable, in the order of the commits: a row in memory is the row of the last commit.
Only a run's last use is newer in memory: its row gets that every few seconds. The memory is empty
at the start, so that damage to the database is found then.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Generic, TypeVar

from cachetools import LRUCache
from sqlalchemy import Connection

from everstep.ledger import operation_rows
from everstep.ledger import tables as t
from everstep.ledger.errors import LedgerError
from everstep.ledger.records import Operation, Run, Sampler
from everstep.ledger.store import Store

Row = TypeVar("Row", Run, Sampler, Operation)
MAX_ROWS = 4096
MAX_ENDED_BYTES = 16 << 20
_MAX_SHARE = 16  # of the operations that ended, one takes at most this fraction of the bytes
_ROW_BYTES = 1024


class Remembered(Generic[Row]):
    """The rows of one table that were used last, by primary key.

    Args:
        capacity: how large they are at most, together.
        largest: how large one is at most.
        size: how large a row is.
    """

    def __init__(self, capacity: int, largest: int, size: Callable[[Row], int]) -> None:
        self._lock = threading.Lock()  # the store's thread writes, the event loop reads
        self._rows: LRUCache[str, Row] = LRUCache(capacity, getsizeof=size)
        self._largest = largest
        self._size: Callable[[Row], int] = size

    def get(self, key: str) -> Row | None:
        """Return a row, or None if it is not held."""
        with self._lock:
            return self._rows.get(key)

    def put(self, key: str, row: Row | None) -> None:
        """Keep a row, unless it is absent or too large."""
        if row is not None and self._size(row) <= self._largest:
            with self._lock:
                self._rows[key] = row

    def clear(self) -> None:
        """Drop all rows."""
        with self._lock:
            self._rows.clear()


class Memory:
    """The rows that are held.

    Args:
        enabled: False where another process writes the database: nothing is held.

    Attributes:
        runs: runs that were used.
        samplers: samplers that were used.
        ended: operations that have ended.
    """

    def __init__(self, *, enabled: bool) -> None:
        rows, size = (MAX_ROWS, MAX_ENDED_BYTES) if enabled else (0, 0)
        self.runs: Remembered[Run] = Remembered(rows, min(1, rows), lambda _: 1)
        self.samplers: Remembered[Sampler] = Remembered(rows, min(1, rows), lambda _: 1)
        self.ended: Remembered[Operation] = Remembered(size, size // _MAX_SHARE, _bytes)
        self._uses: dict[str, datetime] = {}
        self._tables = {
            t.runs.name: self.runs.clear,
            t.samplers.name: self.samplers.clear,
            t.operations.name: self.ended.clear,
        }

    def forget(self, tables: frozenset[str]) -> None:
        """Drop the rows of tables that were written, by name."""
        for name in tables & self._tables.keys():
            self._tables[name]()

    def accepted(self, outcome: tuple[Operation, bool]) -> None:
        """Note that an operation was accepted, if it is new: its run was used then."""
        operation, is_new = outcome
        if is_new:
            self._use(operation.scope, operation.accepted_at)

    def _use(self, run_id: str, moment: datetime) -> None:
        run = self.runs.get(run_id)
        if run is not None:
            self._uses[run_id] = moment
            self.runs.put(run_id, replace(run, last_request_at=moment))

    def used(self, run: Run | None) -> Run | None:
        """Return a run as it was read, with its last use, which its row may not have yet."""
        moment = self._uses.get(run.run_id) if run is not None else None
        if run is None or moment is None or moment <= run.last_request_at:
            return run
        return replace(run, last_request_at=moment)

    async def flush(self, store: Store) -> None:
        """Write what is newer in memory than in the rows, if the store can be written."""
        if self._uses:
            with contextlib.suppress(LedgerError):
                await store.run(self.record_uses)

    def record_uses(self, connection: Connection) -> None:
        """Write the last uses of runs that are not in their rows yet.

        If the transaction is undone, the rows are behind by a few seconds until their next use.
        """
        uses, self._uses = self._uses, {}
        operation_rows.record_uses(connection, uses)

    def finished(self, operation: Operation | None) -> None:
        """Keep an operation that has ended, for the poll that asks for its result."""
        if operation is None or (operation.result_at is not None and operation.result is None):
            return
        if operation.status != "pending":
            self.ended.put(operation.request_id, operation)


def _bytes(operation: Operation) -> int:
    return _ROW_BYTES + len(operation.payload) + len(operation.result or b"")
