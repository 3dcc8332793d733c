"""Workers: the seam between the runtime and the processes that hold models and runs.

A `Worker` is one life of one worker: when it is lost, its replacement is another `Worker`. A
`WorkerPool` starts workers, replaces lost ones and decides where a run is placed. A `Lease` binds
a run to a worker. Its epoch grows with every worker of the pool, so that a lease of an earlier
worker differs from one of its successor.

Implementations: `local_process` (a process on this machine) and `thread` (for tests). One test
suite runs over both: ``tests/runtime/test_workers.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from everstep.engine.models.info import ModelInfo
from everstep.runtime.errors import (
    OperationFailed,
    OutOfMemory,
    RequestUnreadable,
    VaultUnreachable,
    WorkerLost,
)
from everstep.runtime.settings import Settings
from everstep.wire.errors import ErrorCategory
from everstep.wire.messages.streams import DrawnTokens
from everstep.worker.protocol import messages
from everstep.worker.protocol.messages import Command, Reply

R = TypeVar("R", bound=Reply)


class Call(Generic[R]):
    """A command that a worker holds. Must be created on a running event loop.

    Args:
        call_id: its number, from 1. Unique for one worker.
        command: the command.

    Attributes:
        captured: resolves when the run's next command may be sent. For a `SaveRun` the state is
            captured by then. For other commands it resolves together with `done`.
        done: the reply. Raises `OperationFailed` when the command failed, `VaultUnreachable` when
            the vault's storage did not answer, `OutOfMemory` when memory was not enough,
            `RequestUnreadable` when the worker could not read a stored request, and `WorkerLost`
            when the worker ended before it replied. Nothing is known then about the effect of the
            command: a save may or may not be durable. After `Worker.cancel` it never resolves.
        on_drawn: called on the event loop with the tokens of a watched sample.
    """

    def __init__(self, call_id: int, command: Command[R]) -> None:
        loop = asyncio.get_running_loop()
        self.call_id = call_id
        self.command = command
        self.on_drawn: Callable[[Sequence[DrawnTokens]], None] | None = None
        self.captured: asyncio.Future[None] = loop.create_future()
        self.done: asyncio.Future[R] = loop.create_future()

    def fail(self, error: Exception) -> None:
        """End the call with an error. Nothing is logged if nobody awaits it."""
        for future in (self.captured, self.done):
            if not future.done():
                future.set_exception(error)
                future.exception()

    def resolve(self, message: messages.Message) -> None:
        """Apply one message of the worker: an event, the reply or a failure."""
        if isinstance(message, messages.Failed):
            self.fail(_failure(message))
        elif isinstance(message, messages.Drawn):
            if self.on_drawn is not None:
                self.on_drawn(message.drawn)
        else:
            if not self.captured.done():
                self.captured.set_result(None)
            if isinstance(message, Reply) and not self.done.done():
                self.done.set_result(message)  # type: ignore[arg-type]  # the command names it


def _failure(message: messages.Failed) -> Exception:
    if message.unreadable:
        return RequestUnreadable(message.message)
    if message.unreachable:
        return VaultUnreachable(message.message)
    if message.out_of_memory:
        return OutOfMemory(message.message)
    return OperationFailed(message.message, ErrorCategory(message.category))


class Worker(Protocol):
    """One life of one worker.

    Commands of one run are executed in the order in which they were sent. Those of different runs
    and samples take turns.
    """

    @property
    def id(self) -> str:
        """Identifies this life of the worker in logs. Never reused by its pool."""

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        """The models that it serves, by name. Doesn't change, not even after its end."""

    @property
    def refused(self) -> Mapping[str, str]:
        """The models that it can't serve, by name, with the reason. Doesn't change either."""

    @property
    def state_bytes(self) -> int | None:
        """What runs' states may take of its device's memory. None: they lie in the host's."""

    @property
    def environment(self) -> Mapping[str, Any]:
        """Its numeric environment. Doesn't change, not even after its end."""

    @property
    def closed(self) -> bool:
        """Whether it is lost or was closed. Never becomes False again."""

    async def call(self, command: Command[R]) -> Call[R]:
        """Send a command. Returns before it is executed.

        Waits only while the worker's socket is full. If the caller is cancelled meanwhile, the
        call is cancelled as by `cancel`.

        Raises:
            WorkerLost: the worker is closed. The command was not sent.
        """

    def watch(self, call: Call[messages.SampleDone], position: int) -> None:
        """Have `Call.on_drawn` called with a sample's tokens, from a position on.

        A later watch replaces the position. No effect on a sample that has ended, on a call of
        another worker, or when the worker is closed.
        """

    def cancel(self, call: Call[Any]) -> None:
        """Stop a sample and forget the call: its futures never resolve.

        A command of a run isn't stopped. Its reply is ignored. No effect on a call that has ended.
        """


@dataclass(frozen=True)
class Lease:
    """The right to send a run's commands to a worker.

    Attributes:
        worker: where the run's commands go.
        epoch: the worker's number in its pool, from 1. A later worker has a higher one.
    """

    worker: Worker
    epoch: int

    @property
    def valid(self) -> bool:
        """Whether the worker is still there. A lease never becomes valid again."""
        return not self.worker.closed

    async def call(self, command: Command[R]) -> Call[R]:
        """Send a command. Raises `WorkerLost` where the lease is not valid any more."""
        return await self.worker.call(command)


LostCallback = Callable[[Worker, WorkerLost], None]


class WorkerPool(Protocol):
    """Starts workers, replaces those that are lost, and places runs on them."""

    def start(self) -> None:
        """Start workers, and replace each that ends. Must be called once, on the event loop."""

    async def started(self) -> None:
        """Wait until the pool has been ready once. Returns at once afterwards.

        Raises:
            OperationFailed: the first worker could not start: no model could be loaded, or the
                process ended before it was ready. The pool does not try again.
        """

    async def close(self) -> None:
        """End the workers and wait for their end. Calls that they hold raise `WorkerLost`."""

    @property
    def ready(self) -> bool:
        """Whether a worker can take commands now."""

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        """The models that are served, by name. Empty until the pool has been ready once."""

    @property
    def refused(self) -> Mapping[str, str]:
        """The models that can't be served, by name, with the reason of the newest worker."""

    @property
    def state_bytes(self) -> int | None:
        """What runs' states may take of devices' memory, as `Worker.state_bytes`."""

    async def acquire(self, run_id: str, model: str) -> Lease:
        """Wait for a worker and place a run on it.

        A run that is placed already keeps its worker while that lives. The caller checks whether
        the worker serves the model: a pool of identical workers has none that does if one doesn't.

        Args:
            run_id: the run.
            model: its base model.

        Raises:
            WorkerLost: the pool is closed.
        """

    def release(self, run_id: str) -> None:
        """Forget where a run is placed. No error if it isn't placed. Its lease stays valid."""

    async def for_model(self, model: str) -> Lease:
        """Wait for a worker for a command that belongs to no run. Raises as `acquire` does."""

    def on_lost(self, callback: LostCallback) -> None:
        """Call back on the event loop for each worker that was ready and ended.

        The worker's calls have failed by then. Its replacement isn't ready yet. A worker that ends
        because the pool is closed counts as well.
        """


PoolFactory = Callable[[Path, Mapping[str, str], Settings], WorkerPool]
"""Creates a pool without starting it; takes the home, the sources of models by name, settings."""


def not_served(workers: WorkerPool, name: str) -> str:
    """Say why a model is not served, and what to do."""
    if name in workers.refused:
        return f"Model {name!r} is not served here: it {workers.refused[name]}"
    return (
        f"Model {name!r} is not served here. Served: {', '.join(sorted(workers.models))}. To serve "
        f"it, start the service with --model {name}, or --model {name}=DIRECTORY."
    )
