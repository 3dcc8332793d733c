"""OperationQueue: the next operations of one run, in order, a page of the ledger at a time."""

from __future__ import annotations

from everstep.ledger import Ledger, Operation
from everstep.runtime import ids

PAGE_SIZE = 64
_NOTHING = 1 << 62
_EVERYTHING = -1


class OperationQueue:
    """A window on a run's operations in the ledger.

    The ledger is the queue. The window holds the next few operations, without the large requests
    and results that the payload log keeps, so that a long backlog does not fill the memory.

    Args:
        ledger: holds the operations.
        run_id: the run.
    """

    def __init__(self, ledger: Ledger, run_id: str) -> None:
        self._ledger = ledger
        self._run_id = run_id
        self._held: dict[int, Operation] = {}
        self._taken = -1
        # The ledger may have operations from this sequence id on that are not held.
        self._unread_from = _NOTHING

    def __bool__(self) -> bool:
        """Whether an operation waits."""
        return bool(self._held)

    @property
    def last(self) -> int:
        """The highest sequence id that is held."""
        return max(self._held)

    async def reset(self) -> int | None:
        """Read from the ledger again, and return the sequence id of the first unfinished one."""
        pending = await self._ledger.operations(
            self._run_id, status="pending", limit=1, contents=False
        )
        self._held.clear()
        self._taken = -1
        self._unread_from = _EVERYTHING
        return pending[0].seq_id if pending else None

    def push(self, operation: Operation) -> None:
        """Add an operation that was accepted. One that is held or was taken changes nothing.

        A full window keeps the ones with the lowest sequence ids.
        """
        if operation.seq_id <= self._taken:
            return  # a retry
        self._held.setdefault(operation.seq_id, operation.without_contents())
        if len(self._held) > PAGE_SIZE:
            last = self.last
            del self._held[last]
            self._unread_from = min(self._unread_from, last)

    def peek(self, seq_id: int) -> Operation | None:
        """Return an operation without the contents that the payload log holds, if it is held."""
        return self._held.get(seq_id)

    def pop(self, seq_id: int) -> Operation | None:
        """Remove and return an operation, or None if it is not held."""
        return self._held.pop(seq_id, None)

    async def next(self, seq_id: int) -> Operation | None:
        """Remove and return an operation, reading the next page if needed.

        It has its contents, except for the request of a pass that the payload log holds.

        Args:
            seq_id: the operation's sequence id. Those before it were executed.

        Returns:
            None when it has not been accepted.

        Raises:
            LedgerDamaged: it is damaged.
        """
        if seq_id not in self._held and seq_id >= self._unread_from:
            await self._read_page(seq_id)
        operation = self._held.get(seq_id)
        if operation is None:
            return None
        read = operation.kind not in ids.PASSES  # a worker reads those where they lie
        filled = await self._ledger.contents.fill(operation, payload=read)
        self._held.pop(seq_id, None)
        self._taken = seq_id
        return filled

    async def _read_page(self, seq_id: int) -> None:
        self._unread_from = _NOTHING  # what is accepted from now on is pushed
        page = await self._ledger.operations(
            self._run_id, after=seq_id - 1, limit=PAGE_SIZE, contents=False
        )
        for operation in page:
            self._held.setdefault(operation.seq_id, operation)
        if len(page) == PAGE_SIZE:
            self._unread_from = min(self._unread_from, page[-1].seq_id + 1)
