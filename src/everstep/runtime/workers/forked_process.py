"""Forked processes: workers that a zygote forks."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from everstep.logs import get_logger
from everstep.runtime.workers.launch import Handle, Launcher
from everstep.runtime.workers.zygote import shared_path
from everstep.worker.protocol.heartbeat import HeartbeatPage
from everstep.worker.zygote.fit import differences
from everstep.worker.zygote.owner import UNFIT, Zygote

_log = get_logger("everstep.worker")
_STATUS_BYTES = 1024


class ForkLauncher:
    """Has a zygote fork every worker. Implements `Launcher`.

    A zygote that ended is replaced at once, and one that is no longer fit (the service was moved
    to another control group, say) before the next worker. Where a zygote can't fork, the worker is
    spawned.

    Args:
        arguments: of `everstep.worker.main.serve`.
        fallback: starts workers where no zygote can.
        zygote: one that was started before. Owned by the launcher. None: it is found or started
            with the first worker.
    """

    def __init__(
        self, arguments: Mapping[str, Any], fallback: Launcher, zygote: Zygote | None = None
    ) -> None:
        self._arguments = arguments
        self._fallback = fallback
        self._zygote = zygote
        self._closed = False
        self._unfit = False

    async def launch(self, sock: socket.socket, page: HeartbeatPage) -> Handle:
        """See `Launcher.launch`."""
        if self._unfit:
            return await self._fallback.launch(sock, page)
        try:
            zygote = await self._fit_zygote()
            status = await asyncio.to_thread(
                zygote.fork, self._arguments, sock.fileno(), page.descriptor
            )
            process = await _started(status)
        except OSError as error:
            if self._closed:
                raise
            _log.warning("the zygote can't fork, spawning a worker", reason=str(error))
            self._unfit = self._drop_zygote() == UNFIT
            return await self._fallback.launch(sock, page)
        self._watch(zygote)
        return process

    async def close(self) -> None:
        """See `Launcher.close`."""
        self._closed = True
        self._drop_zygote()
        await self._fallback.close()

    async def _fit_zygote(self) -> Zygote:
        """The zygote to fork from: the present one, the shared one, or a new one of our own."""
        if self._zygote is not None and not await self._fits(self._zygote):
            self._drop_zygote()
        if self._zygote is None:
            self._zygote = await self._shared() or Zygote.start(self._label)
        return self._zygote

    async def _shared(self) -> Zygote | None:
        path = shared_path()
        if path is None:
            return None
        try:
            zygote = Zygote.connect(path)
        except OSError as error:
            _log.warning("no zygote to share", path=str(path), reason=str(error))
            return None
        if await self._fits(zygote):
            return zygote
        zygote.close()
        return None

    async def _fits(self, zygote: Zygote) -> bool:
        if not zygote.alive:
            return False
        try:
            found = differences(await asyncio.to_thread(lambda: zygote.pid))
        except OSError as error:
            found = [str(error)]
        if found:
            _log.info("the zygote does not fit, starting another", differences=found)
        return not found

    @property
    def _label(self) -> str:
        return json.dumps({"home": self._arguments["home"]})

    def _watch(self, zygote: Zygote) -> None:
        """Replace a zygote that has forked before as soon as it ends."""

        def read() -> None:
            if not zygote.control.recv(_STATUS_BYTES):  # b"" at its end, its greeting before
                _log.warning("the zygote ended, starting another")
                self._drop_zygote()
                self._zygote = Zygote.start(self._label)

        asyncio.get_running_loop().add_reader(zygote.control, read)

    def _drop_zygote(self) -> int | None:
        """End or leave the zygote. Returns the exit code of one that had ended by itself."""
        zygote, self._zygote = self._zygote, None
        if zygote is None:
            return None
        asyncio.get_running_loop().remove_reader(zygote.control)
        return zygote.close()


class ForkedProcess:
    """A process that a zygote forked. Implements `Handle`.

    Args:
        pid: its process id.
        pidfd: refers to it, even when its id is reused.
        status: where the zygote reports its end.
    """

    def __init__(self, pid: int, pidfd: int, status: socket.socket) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._status = status
        self._ended = False

    @property
    def id(self) -> str:
        """See `Handle.id`."""
        return f"process {self.pid}"

    def kill(self) -> None:
        """See `Handle.kill`."""
        if not self._ended:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def wait(self) -> int | None:
        """See `Handle.wait`, or None where the zygote ended before it."""
        await _readable(self._status.fileno())
        message = self._status.recv(_STATUS_BYTES)
        if not message:
            await _readable(self._pidfd)
        self._ended = True
        self._status.close()
        os.close(self._pidfd)
        return int(json.loads(message)["code"]) if message else None


async def _started(status: socket.socket) -> ForkedProcess:
    """Wait until a requested worker is forked.

    Raises:
        OSError: it could not be. The zygote may be gone.
    """
    try:
        await _readable(status.fileno())
        message, descriptors, _, _ = socket.recv_fds(status, _STATUS_BYTES, 1)
        if not message:
            raise ConnectionResetError("the zygote ended")
        answer = json.loads(message)
        if "error" in answer:
            raise OSError(answer["error"])
    except BaseException:
        status.close()
        raise
    return ForkedProcess(answer["pid"], descriptors[0], status)


async def _readable(descriptor: int) -> None:
    """Wait until a descriptor can be read without blocking."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def resolve() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(descriptor, resolve)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)
