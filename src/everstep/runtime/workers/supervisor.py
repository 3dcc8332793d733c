"""Supervisor: a pool of one worker that is replaced whenever it ends.

A worker that makes no step for too long is hung, and is killed. When the service ends, the worker
sees its socket close and ends too.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from time import monotonic

from everstep.backoff import Backoff
from everstep.engine.models.info import ModelInfo
from everstep.logs import get_logger
from everstep.runtime.errors import OperationFailed, WorkerLost
from everstep.runtime.workers.base import Lease, LostCallback
from everstep.runtime.workers.connection import SocketWorker
from everstep.runtime.workers.launch import Handle, Launcher, describe_end, killed_from_outside
from everstep.runtime.workers.memory import oom_kills
from everstep.wire.errors import ErrorCategory
from everstep.worker.protocol.heartbeat import IDLE, HeartbeatPage
from everstep.worker.protocol.messages import Ready, Unusable

_log = get_logger("everstep.worker")
_BACKOFF = Backoff(initial=0.1, max=30.0)
STABLE_SECONDS = 1.0
"""A worker that was ready for this long is replaced at once; a shorter-lived one backs off."""
CHECKS_PER_HANG = 8


class SupervisedPool:
    """One worker at a time. Implements `WorkerPool`.

    Args:
        launcher: starts workers.
        hang_seconds: how long one step may take before the worker is taken for hung.

    Attributes:
        ends: how each worker so far ended, the latest last.
    """

    def __init__(self, launcher: Launcher, hang_seconds: float) -> None:
        self._launcher = launcher
        self._hang_seconds = hang_seconds
        self._closing = asyncio.Event()
        self._changed = asyncio.Event()
        self._lease: Lease | None = None
        self._epoch = 0
        self._models: Mapping[str, ModelInfo] = {}
        self._refused: Mapping[str, str] = {}
        self._state_bytes: int | None = None
        self._worker: SocketWorker | None = None
        self._handle: Handle | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._first_start: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_lost: list[LostCallback] = []
        self.ends: list[str] = []

    @property
    def ready(self) -> bool:
        """See `WorkerPool.ready`."""
        return self._lease is not None and self._lease.valid

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        """See `WorkerPool.models`."""
        return self._models

    @property
    def refused(self) -> Mapping[str, str]:
        """See `WorkerPool.refused`."""
        return self._refused

    @property
    def state_bytes(self) -> int | None:
        """See `WorkerPool.state_bytes`."""
        return self._state_bytes

    def start(self) -> None:
        """See `WorkerPool.start`."""
        self._supervisor = asyncio.create_task(self._supervise(), name="worker supervisor")

    async def started(self) -> None:
        """See `WorkerPool.started`."""
        await asyncio.shield(self._first_start)

    async def close(self) -> None:
        """See `WorkerPool.close`."""
        self._closing.set()
        self._changed.set()
        if self._worker is not None:
            self._worker.hang_up()
        elif self._handle is not None:
            self._handle.kill()
        else:
            await self._launcher.close()  # breaks off a launch
        if self._supervisor is not None:
            await self._supervisor
        await self._launcher.close()
        if self._first_start.done():
            self._first_start.exception()

    async def acquire(self, run_id: str, model: str) -> Lease:
        """See `WorkerPool.acquire`. Every run is placed on the one worker there is."""
        return await self._ready_lease()

    def release(self, run_id: str) -> None:
        """See `WorkerPool.release`."""

    async def for_model(self, model: str) -> Lease:
        """See `WorkerPool.for_model`."""
        return await self._ready_lease()

    def on_lost(self, callback: LostCallback) -> None:
        """See `WorkerPool.on_lost`."""
        self._on_lost.append(callback)

    async def _ready_lease(self) -> Lease:
        while True:
            if self._closing.is_set():
                raise WorkerLost("the service is stopping")
            if self._lease is not None and self._lease.valid:
                return self._lease
            self._changed.clear()
            await self._changed.wait()

    async def _supervise(self) -> None:
        early_ends = 0
        while not self._closing.is_set():
            ready_seconds = await self._run_once()
            if self._closing.is_set():
                break
            delay = 0.0
            if ready_seconds < STABLE_SECONDS:
                delay = _BACKOFF.delay(early_ends)
                early_ends += 1
            else:
                early_ends = 0
            _log.error("worker ended, starting another", how=self.ends[-1], after_seconds=delay)
            await self._wait_closing(delay)

    async def _wait_closing(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            pass

    async def _run_once(self) -> float:
        """Run one worker until it ends. Returns for how many seconds it was ready."""
        page = HeartbeatPage()
        kills_before = oom_kills()
        try:
            worker, handle = await self._launch(page)
        except OSError as error:
            page.close()
            self.ends.append(f"could not be started: {error}")
            self._give_up(self.ends[-1])
            return 0.0
        watchdog = asyncio.create_task(self._watch(handle, page), name="worker watchdog")
        ready_at = None
        first = await worker.wait_ready()
        if isinstance(first, Ready):
            ready_at = monotonic()
            self._become_ready(worker)
            await worker.serve()
        elif isinstance(first, Unusable):
            _log.error("the worker can't serve", reason=first.reason)
            self._give_up(first.reason)
        ready_seconds = 0.0 if ready_at is None else monotonic() - ready_at
        worker.hang_up()
        self._worker = self._handle = None
        code = await handle.wait()
        hung = await _cancelled(watchdog)
        out_of_memory = oom_kills() > kills_before
        self.ends.append(describe_end(code, hung=hung, out_of_memory=out_of_memory))
        killed = killed_from_outside(code, hung=hung, out_of_memory=out_of_memory)
        lost = WorkerLost(f"the worker {self.ends[-1]}", killed=killed)
        worker.lose(lost, page.read().call_id, page.writing)
        page.close()
        if ready_at is None:
            self._give_up(self.ends[-1])
        else:
            for callback in self._on_lost:
                callback(worker, lost)
        return ready_seconds

    async def _launch(self, page: HeartbeatPage) -> tuple[SocketWorker, Handle]:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                handle = self._handle = await self._launcher.launch(theirs, page)
            except BaseException:
                ours.close()
                raise
        reader, writer = await asyncio.open_connection(sock=ours)
        worker = SocketWorker(handle.id, reader, writer)
        self._worker = worker
        if self._closing.is_set():
            worker.hang_up()
        return worker, handle

    async def _watch(self, handle: Handle, page: HeartbeatPage) -> bool:
        """Kill the worker when one step takes too long. Returns True when it was."""
        last, unchanged = page.read(), 0
        while True:
            await asyncio.sleep(self._hang_seconds / CHECKS_PER_HANG)  # the interval of the checks
            now = page.read()
            unchanged = unchanged + 1 if now == last and now.call_id != IDLE else 0
            last = now
            if unchanged >= CHECKS_PER_HANG:
                handle.kill()
                return True

    def _become_ready(self, worker: SocketWorker) -> None:
        self._models, self._refused = worker.models, worker.refused
        self._state_bytes = worker.state_bytes
        self._epoch += 1
        self._lease = Lease(worker, self._epoch)
        self._changed.set()
        _log.info("worker ready", worker=worker.id, models=sorted(worker.models))
        for name, reason in worker.refused.items():
            _log.error("model not served", model=name, reason=reason)
        if not self._first_start.done():
            self._first_start.set_result(None)

    def _give_up(self, reason: str) -> None:
        """Stop if the first worker did not start: the service does not start either then."""
        if not self._first_start.done():
            self._closing.set()
            self._changed.set()
            self._first_start.set_exception(OperationFailed(reason, ErrorCategory.SERVER))


async def _cancelled(watchdog: asyncio.Task[bool]) -> bool:
    """End the watchdog. Returns whether it had killed the worker."""
    watchdog.cancel()
    try:
        return await watchdog
    except asyncio.CancelledError:
        return False
