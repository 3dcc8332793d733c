"""OperationQueue: the next operations of one run, in order, a page of the ledger at a time."""

from __future__ import annotations

from everstep.ledger import Ledger, Operation

PAGE_SIZE = 64


class OperationQueue:
    """A window on a run's operations in the ledger.

    The ledger is the queue. The window holds the next few operations, so that a long backlog does
    not fill the memory.

    Args:
        ledger: holds the operations.
        run_id: the run.
    """

    def __init__(self, ledger: Ledger, run_id: str) -> None:
        self._ledger = ledger
        self._run_id = run_id
        self._held: dict[int, Operation] = {}
        self._more = False

    def __bool__(self) -> bool:
        """Whether an operation waits."""
        return bool(self._held)

    @property
    def last(self) -> int:
        """The highest sequence id that is held."""
        return max(self._held)

    def reset(self) -> None:
        """Read from the ledger again."""
        self._held.clear()
        self._more = True

    def push(self, operation: Operation) -> None:
        """Add an operation that was accepted. One that is held already changes nothing."""
        if len(self._held) < PAGE_SIZE:
            self._held.setdefault(operation.seq_id, operation)
        else:
            self._more = True  # it is in the ledger

    def pop(self, seq_id: int) -> Operation | None:
        """Remove and return an operation, or None if it is not held."""
        return self._held.pop(seq_id, None)

    async def next(self, seq_id: int) -> Operation | None:
        """Remove and return an operation, reading the next page if needed.

        Args:
            seq_id: the operation's sequence id. Those before it were executed.

        Returns:
            None when it has not been accepted.
        """
        if seq_id not in self._held and self._more:
            await self._read_page(seq_id)
        return self._held.pop(seq_id, None)

    async def _read_page(self, seq_id: int) -> None:
        self._more = False
        page = await self._ledger.operations(self._run_id, after=seq_id - 1, limit=PAGE_SIZE)
        for operation in page:
            self._held.setdefault(operation.seq_id, operation)
        if len(page) == PAGE_SIZE and seq_id in self._held:
            self._more = True
