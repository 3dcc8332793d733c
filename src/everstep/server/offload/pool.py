"""The service's side of the process that computes large bodies and results."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from everstep.logs import get_logger
from everstep.runtime import Rejected
from everstep.server.offload.budget import ByteBudget
from everstep.server.offload.process import MESSAGE_BYTES
from everstep.spool import Spool, freed

INLINE_BYTES = 128 << 10
"""Larger bodies and results are computed in the process.

On two busy cores a pass of 130 KiB took 0.6 ms (16 datums) to 3.5 ms (128) on the event loop, and
the way to the process and back added about 1 ms.
"""
MAX_HELD_BYTES = 512 << 20
"""Of bodies and results that wait for the process, or are received."""
_log = get_logger("everstep.server")


class Offload:
    """Computes jobs in a process, one after the other. It is started with the first one.

    The service's memory doesn't grow with the bodies that wait for room: they stay in their
    clients' sockets.

    Attributes:
        budget: bounds the bytes of the bodies that are held at a time.
        parsing: held while a thread parses a large message.
    """

    def __init__(self) -> None:
        self.budget = ByteBudget(MAX_HELD_BYTES)
        self.parsing = asyncio.Lock()
        self._turn = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    @asynccontextmanager
    async def spool(self, size: int) -> AsyncIterator[Spool]:
        """Wait until a body of some bytes at most may be held, and make its spool.

        Raises:
            Rejected: there is no room for it (503).
        """
        async with self.budget.reserve(size), spooled() as spool:
            yield spool

    async def run(self, job: str, arguments: Mapping[str, Any], body: Spool) -> tuple[Any, Spool]:
        """Compute a job of `JOBS`.

        Returns:
            What it found out, and its bytes. The caller closes the spool.

        Raises:
            Rejected: the process ended (503). The next job has another one.
            RuntimeError: the job failed.
        """
        request = {"job": job, "arguments": arguments, "size": body.size}
        message = json.dumps(request).encode() + b"\n"
        async with self._turn:
            exchange = asyncio.ensure_future(asyncio.to_thread(self._exchange, message, body))
            try:
                return await asyncio.shield(exchange)
            except asyncio.CancelledError:
                await asyncio.wait([exchange])  # it uses the spool, and the turn is its own
                if exchange.exception() is None:
                    await freed(exchange.result()[1])
                raise

    def close(self) -> None:
        """End the process."""
        process, connection = self._process, self._socket
        self._process = self._socket = None
        if process is not None and connection is not None:
            connection.close()
            process.kill()
            process.wait()

    def _exchange(self, message: bytes, body: Spool) -> tuple[Any, Spool]:
        result = Spool()
        try:
            return self._exchange_spools(message, body, result), result
        except BaseException:
            result.close()
            raise

    def _exchange_spools(self, message: bytes, body: Spool, result: Spool) -> Any:
        connection = self._connected()
        try:
            descriptors = [body.descriptor, result.descriptor]
            sent = socket.send_fds(connection, [message], descriptors)
            connection.sendall(message[sent:])
            reply = b""
            while not reply.endswith(b"\n"):
                part = connection.recv(MESSAGE_BYTES)
                if not part:
                    raise ConnectionResetError("it ended")
                reply += part
        except OSError as error:
            _log.error("the process for large bodies ended, starting another", reason=str(error))
            self.close()
            raise Rejected(503, "The service failed to read this; try again.") from error
        answer = json.loads(reply)
        if "failed" in answer:
            raise RuntimeError(f"a job failed in the process for large bodies:\n{answer['failed']}")
        result.size = answer["size"]
        return answer["facts"]

    def _connected(self) -> socket.socket:
        """Return the socket of the process, which is started if there is none."""
        if self._socket is None:
            ours, theirs = socket.socketpair()
            with theirs:
                module = "everstep.server.offload.process"
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", module, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C stops the service, which stops the process
                )
            self._socket = ours
        return self._socket


@asynccontextmanager
async def spooled() -> AsyncIterator[Spool]:
    """Hold a new spool for the duration of the block."""
    spool = Spool()
    try:
        yield spool
    finally:
        await freed(spool)
