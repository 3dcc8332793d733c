"""Lookahead: sends a run's next command to the worker while the current one executes.

The worker finds its next command when it has finished one. It does not wait until the service has
received the reply and begun to record it. At most one command is sent ahead, of a pass or a step of
the optimizer behind another. The worker executes both in order, and a command that fails changes
nothing, so the state is the one that the next command would have found without being sent ahead.

While a command is ahead, the run's state in memory may be newer than the run's position. So no
snapshot is taken meanwhile, and a run that can't go on is brought back from the ledger.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from everstep.failpoints import Failpoint
from everstep.ledger import Operation
from everstep.runtime import ids
from everstep.runtime.errors import WorkerLost
from everstep.runtime.execution.operation_queue import OperationQueue
from everstep.runtime.workers.base import Call
from everstep.worker.protocol import messages

R = TypeVar("R", bound=messages.Reply)
SendNext = Callable[[Operation], Awaitable[Call[Any]]]
KINDS = frozenset({ids.FORWARD, ids.FORWARD_BACKWARD, ids.OPTIM_STEP})
"""Operations whose commands may be sent ahead, and behind which others may be."""
_SENT = Failpoint("runtime.execute.ahead", "a command is sent, the one before it may still execute")


class Lookahead:
    """Sends training commands, and the next one of each ahead.

    Args:
        queue: the run's operations.
        allowed: whether an operation may be executed before anything else is done with the run.
    """

    def __init__(self, queue: OperationQueue, allowed: Callable[[Operation], bool]) -> None:
        self._queue = queue
        self._allowed = allowed
        self._executing: int | None = None
        self._send_next: SendNext | None = None
        self._alone = -1  # the operation that nothing is sent behind
        self._ahead: asyncio.Task[tuple[Operation, Call[Any]]] | None = None

    @property
    def busy(self) -> bool:
        """Whether a command is ahead: the worker may have executed it."""
        return self._ahead is not None

    async def operation(self) -> Operation | None:
        """Return the operation whose command is ahead.

        Raises:
            WorkerLost: the worker had ended. Nothing was sent.
        """
        return (await self._ahead)[0] if self._ahead is not None else None

    async def begin(
        self, operation: Operation, send: Callable[[], Awaitable[Call[R]]], send_next: SendNext
    ) -> Call[R]:
        """Send an operation's command, unless it was ahead. Until `end` the next one may follow.

        It is called again where the worker had not enough memory for the command.

        Args:
            operation: the next operation.
            send: sends its command.
            send_next: sends the command of the operation behind it.

        Raises:
            WorkerLost: the command can't be sent again, since the next one would come first. The
                run has to be brought back.
        """
        if self._executing == operation.seq_id:
            self._alone = operation.seq_id
            self.end()
            if self.busy:
                raise WorkerLost("memory was not enough for a command, and the next one was sent")
        ahead, self._ahead = self._ahead, None
        call = await send() if ahead is None else (await ahead)[1]
        if operation.seq_id != self._alone:
            self._executing, self._send_next = operation.seq_id, send_next
            self.look()
        return call

    def end(self) -> None:
        """Send nothing ahead until the next command is begun."""
        self._executing = None

    def look(self) -> None:
        """Send the next operation's command, if it is there and may follow what executes."""
        if self._executing is None or self._send_next is None or self._ahead is not None:
            return
        operation = self._queue.peek(self._executing + 1)
        if operation is not None and _may_follow(operation) and self._allowed(operation):
            sending = self._send_ahead(operation.seq_id, self._send_next)
            self._ahead = asyncio.create_task(sending, name=f"send {operation.request_id} ahead")

    async def _send_ahead(self, seq_id: int, send: SendNext) -> tuple[Operation, Call[Any]]:
        operation = await self._queue.next(seq_id)
        assert operation is not None, "it was in the queue"
        call = await send(operation)
        _SENT()
        return operation, call

    async def abandon(self) -> bool:
        """Forget the command that is ahead. Returns whether there was one."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return False
        ahead.cancel()
        await asyncio.gather(ahead, return_exceptions=True)
        return True


def _may_follow(operation: Operation) -> bool:
    """Whether an operation trains, and its request is small.

    The time between larger ones does not matter, and the worker would hold one more of each run.
    """
    in_row = operation.payload_at is None
    return operation.status == "pending" and operation.kind in KINDS and in_row
