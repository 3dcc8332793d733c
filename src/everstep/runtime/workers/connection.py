"""Connection: a worker at the other end of a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeVar

from everstep.engine.models.info import ModelInfo
from everstep.runtime.errors import WorkerLost
from everstep.runtime.workers.base import Call
from everstep.runtime.workers.result_room import ResultRoom
from everstep.worker.protocol import messages
from everstep.worker.protocol.channel import pack, read_envelope
from everstep.worker.protocol.heartbeat import SAMPLING

R = TypeVar("R", bound=messages.Reply)


class SocketWorker:
    """One life of a worker that is reached over a socket. Implements `Worker`.

    Args:
        worker_id: identifies it in logs.
        reader: its messages.
        writer: where commands go.
    """

    def __init__(
        self, worker_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._id = worker_id
        self._reader = reader
        self._writer = writer
        self._calls: dict[int, Call[Any]] = {}
        self._last_call_id = 0
        self._closed = False
        self._models: dict[str, ModelInfo] = {}
        self._environment: dict[str, Any] = {}
        self._refused: dict[str, str] = {}
        self._state_bytes: int | None = None
        self._room = ResultRoom()

    @property
    def id(self) -> str:
        """See `Worker.id`."""
        return self._id

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        """See `Worker.models`."""
        return self._models

    @property
    def refused(self) -> Mapping[str, str]:
        """See `Worker.refused`."""
        return self._refused

    @property
    def state_bytes(self) -> int | None:
        """See `Worker.state_bytes`."""
        return self._state_bytes

    @property
    def environment(self) -> Mapping[str, Any]:
        """See `Worker.environment`."""
        return self._environment

    @property
    def closed(self) -> bool:
        """See `Worker.closed`."""
        return self._closed

    async def wait_ready(self) -> messages.Ready | messages.Unusable | None:
        """Wait for the worker's first message, or None when it ends before it sent one."""
        envelope = await read_envelope(self._reader, self._room.spool)
        if envelope is None:
            return None
        first = envelope.message
        if not isinstance(first, messages.Ready | messages.Unusable):
            raise TypeError(f"a worker's first message can't be {first!r}")
        if isinstance(first, messages.Ready):
            self._models = {info.name: info for info in first.models}
            self._environment = dict(first.environment)
            self._refused = dict(first.refused)
            self._state_bytes = first.state_bytes
        return first

    async def serve(self) -> None:
        """Resolve calls until the worker ends."""
        while (envelope := await read_envelope(self._reader, self._room.spool)) is not None:
            call = self._calls.get(envelope.call_id)
            if call is None:
                continue  # it was cancelled
            call.resolve(envelope.message)
            if call.done.done():
                del self._calls[envelope.call_id]
        self._closed = True

    async def call(self, command: messages.Command[R]) -> Call[R]:
        """See `Worker.call`."""
        if self._closed:
            raise WorkerLost("the worker that held it is gone")
        self._last_call_id += 1
        call = Call(self._last_call_id, command)
        self._calls[call.call_id] = call
        self._writer.write(pack(call.call_id, command))
        try:
            await self._writer.drain()
        except ConnectionError:
            call.fail(WorkerLost("the worker ended"))
        except asyncio.CancelledError:
            self.cancel(call)
            raise
        return call

    def watch(self, call: Call[messages.SampleDone], position: int) -> None:
        """See `Worker.watch`."""
        self._send(call, messages.Watch(position))

    def cancel(self, call: Call[Any]) -> None:
        """See `Worker.cancel`."""
        self._send(call, messages.Cancel())
        if self._calls.get(call.call_id) is call:
            del self._calls[call.call_id]

    def _send(self, call: Call[Any], command: messages.Command[Any]) -> None:
        """Send a command without a reply about a call that the worker holds."""
        if self._calls.get(call.call_id) is call and not self._closed:
            self._writer.write(pack(call.call_id, command))

    def hang_up(self) -> None:
        """Close the socket: the worker ends, and so does `serve`."""
        self._closed = True
        with suppress(RuntimeError):  # the event loop is closed
            self._writer.close()

    def lose(self, end: WorkerLost, executing: int, writing: int) -> None:
        """Fail the calls that the worker held, after its end.

        Args:
            end: how it ended.
            executing: the call that it was executing, as its heartbeat says. It is blamed, or all
                samples where it was executing a batch of them.
            writing: the call whose files it was writing. It is blamed as well.
        """
        self.hang_up()
        calls, self._calls = self._calls, {}
        for call_id, call in calls.items():
            sampling = isinstance(call.command, messages.Sample)
            blamed = call_id in (executing, writing) or (executing == SAMPLING and sampling)
            call.fail(WorkerLost(end.reason, blamed=blamed, killed=end.killed))
