"""The service's handle on its worker: a child process that holds the models and the runs.

The child is started by ``python -m everstep.runtime.worker`` with one end of a socket pair. When
it ends, for whatever reason, every call it held raises `WorkerLost` and another one is started.
When the service ends, the child sees the socket close and ends too. A worker that makes no step
for too long is hung, and is killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from everstep.engine.info import ModelInfo
from everstep.runtime.channel import Message, pack, read_message
from everstep.runtime.errors import OperationFailed, RuntimeFault, VaultUnreachable, WorkerLost
from everstep.runtime.memory import oom_kills
from everstep.runtime.progress import IDLE, SAMPLING, ProgressPage
from everstep.runtime.settings import Settings
from everstep.wire.errors import ErrorCategory
from everstep.wire.streams import DrawnTokens

_log = structlog.get_logger("everstep.worker")
_FIRST_DELAY = 0.5
_LONGEST_DELAY = 30.0
_LOOKS_PER_HANG = 8


class Call:
    """A call that a worker holds.

    Args:
        call_id: its number.
        sampling: whether it is one of a batch that is executed together.

    Attributes:
        captured: done when the run's next operation may start (a save: the state is captured).
        done: the final reply.
        on_drawn: called with what a watched sample has drawn, by position.
    """

    def __init__(self, call_id: int, *, sampling: bool = False) -> None:
        loop = asyncio.get_running_loop()
        self.call_id = call_id
        self.sampling = sampling
        self.on_drawn: Callable[[list[DrawnTokens]], None] | None = None
        self.captured: asyncio.Future[None] = loop.create_future()
        self.done: asyncio.Future[Message] = loop.create_future()

    def fail(self, error: RuntimeFault) -> None:
        """End the call with an error; whoever waits gets it."""
        for future in (self.captured, self.done):
            if not future.done():
                future.set_exception(error)
                future.exception()

    def resolve(self, message: Message) -> None:
        """Take one reply of the worker."""
        event = message.header["event"]
        if event == "failed":
            text, category = message.header["message"], message.header["category"]
            unreachable = message.header.get("unreachable", False)
            self.fail(
                VaultUnreachable(text)
                if unreachable
                else OperationFailed(text, ErrorCategory(category))
            )
            return
        if event == "drawn":
            if self.on_drawn is not None:
                self.on_drawn([DrawnTokens(**each) for each in message.header["drawn"]])
            return
        if not self.captured.done():
            self.captured.set_result(None)
        if event == "done" and not self.done.done():
            self.done.set_result(message)


class WorkerProcess:
    """Starts the worker, keeps it running, and passes calls to it.

    Attributes:
        generation: counts workers that became ready, from 1.
        models: what the worker serves, by name.
        environment: its numeric environment.
        ends: how each worker so far ended, the latest last.
    """

    def __init__(self, home: Path, models: Mapping[str, str], settings: Settings) -> None:
        self._arguments = {
            "home": str(home),
            "models": dict(models),
            "threads": settings.threads or os.cpu_count() or 1,
            "device": settings.device,
            "dtype": settings.dtype,
            "disk_reserve_bytes": settings.disk_reserve_bytes,
            "prefix_bytes": settings.prefix_bytes,
            "vault_retry_seconds": settings.vault_retry_seconds,
        }
        self._hang_seconds = settings.hang_seconds
        self._calls: dict[int, Call] = {}
        self._next_id = 0
        self._ready = asyncio.Event()
        self._closing = False
        self._hung = False
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._first_start: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.generation = 0
        self.models: dict[str, ModelInfo] = {}
        self.environment: dict[str, Any] = {}
        self.ends: list[str] = []

    @property
    def ready(self) -> bool:
        """Whether a worker is up with all models loaded."""
        return self._ready.is_set()

    @property
    def pid(self) -> int | None:
        """Process id of the worker that runs now."""
        return self._process.pid if self._process and self._process.returncode is None else None

    def start(self) -> None:
        """Start the worker, and another one whenever it ends."""
        self._supervisor = asyncio.create_task(self._supervise(), name="worker supervisor")

    async def started(self) -> None:
        """Wait until the first worker has its models loaded.

        Raises:
            OperationFailed: a model could not be loaded; the text says which and why.
        """
        await asyncio.shield(self._first_start)

    async def close(self) -> None:
        """End the worker; calls it still holds raise `WorkerLost`."""
        self._closing = True
        if self._writer is not None:
            self._writer.close()
        elif self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
        if self._supervisor is not None:
            await self._supervisor
        if self._first_start.done():
            self._first_start.exception()

    async def wait_ready(self) -> int:
        """Wait for a worker that is being started; returns its generation, 1 for the first."""
        await self._ready.wait()
        return self.generation

    async def call(self, header: Mapping[str, Any], body: bytes, generation: int) -> Call:
        """Send a command to the worker.

        Args:
            header: the command and its arguments, JSON.
            body: arrays in the protobuf form of the wire.
            generation: the worker that the caller means.

        Returns:
            The call; its futures raise `OperationFailed` or `WorkerLost`.

        Raises:
            WorkerLost: that worker is gone.
        """
        if self._writer is None or not self.ready or generation != self.generation:
            raise WorkerLost("the worker that held it is gone")
        self._next_id += 1
        call = Call(self._next_id, sampling=header["command"] == "sample")
        self._calls[call.call_id] = call
        self._writer.write(pack(Message({**header, "id": call.call_id}, body)))
        try:
            await self._writer.drain()
        except ConnectionError:
            call.fail(WorkerLost("the worker ended"))
        except asyncio.CancelledError:
            self.cancel(call)
            raise
        return call

    def watch(self, call: Call, position: int) -> None:
        """Have a sample told of as it is drawn, from a position on; see `Call.on_drawn`."""
        self._tell(call, {"command": "watch", "position": position})

    def cancel(self, call: Call) -> None:
        """Stop a sample; nothing more comes of the call."""
        self._tell(call, {"command": "cancel"})
        self._calls.pop(call.call_id, None)

    def _tell(self, call: Call, header: Mapping[str, Any]) -> None:
        """Send what has no reply, of a call that the worker holds."""
        if call.call_id in self._calls and self._writer is not None:
            self._writer.write(pack(Message({**header, "id": call.call_id})))

    async def _supervise(self) -> None:
        delay = _FIRST_DELAY
        while not self._closing:
            was_ready = await self._run_once()
            if self._closing:
                break
            delay = _FIRST_DELAY if was_ready else min(delay * 2, _LONGEST_DELAY)
            _log.error("the worker ended; starting another", how=self.ends[-1], after_seconds=delay)
            await asyncio.sleep(delay)  # backs off; nothing waits on its length

    async def _run_once(self) -> bool:
        """Run one worker until it ends; returns whether it became ready."""
        page = ProgressPage()
        kills_before, self._hung = oom_kills(), False
        reader, self._process = await self._spawn(page)
        watchdog = asyncio.create_task(self._watch(page), name="worker watchdog")
        became_ready = False
        while (message := await read_message(reader)) is not None:
            if message.header["event"] == "ready":
                self._become_ready(message)
                became_ready = True
            elif message.header["event"] == "unusable":
                _log.error("the worker can't serve", reason=message.header["message"])
                self._give_up(message.header["message"])
            else:
                self._reply(message)
        self._ready.clear()
        watchdog.cancel()
        code = await self._process.wait()
        if self._writer is not None:
            self._writer.close()
        how = _how_it_ended(code, hung=self._hung, out_of_memory=oom_kills() > kills_before)
        self.ends.append(how)
        self._fail_calls(how, page)
        page.close()
        if not became_ready:
            self._give_up(how)
        return became_ready

    async def _spawn(
        self, page: ProgressPage
    ) -> tuple[asyncio.StreamReader, asyncio.subprocess.Process]:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "everstep.runtime.worker"),
                *(str(theirs.fileno()), str(page.descriptor), json.dumps(self._arguments)),
                pass_fds=(theirs.fileno(), page.descriptor),
                stdin=asyncio.subprocess.DEVNULL,
                # Threads that spin at a barrier on a shared core made a pass 20 times slower.
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
                start_new_session=True,  # Ctrl-C in the terminal is the service's to handle
            )
        reader, self._writer = await asyncio.open_connection(sock=ours)
        return reader, process

    async def _watch(self, page: ProgressPage) -> None:
        """Kill the worker when it has been at one step for too long."""
        last, looks = page.read(), 0
        while True:
            await asyncio.sleep(self._hang_seconds / _LOOKS_PER_HANG)  # a look now and then
            now = page.read()
            looks = looks + 1 if now == last and now.call_id != IDLE else 0
            last = now
            if looks >= _LOOKS_PER_HANG and self._process is not None:
                self._hung = True
                with suppress(ProcessLookupError):
                    self._process.send_signal(signal.SIGKILL)
                return

    def _fail_calls(self, how: str, page: ProgressPage) -> None:
        """End what the worker held; blame the call that it was executing, and no other."""
        executing = page.read().call_id
        calls, self._calls = self._calls, {}
        for call_id, call in calls.items():
            blamed = call_id == executing or (executing == SAMPLING and call.sampling)
            call.fail(WorkerLost(f"the worker {how}", blamed=blamed))

    def _become_ready(self, message: Message) -> None:
        self.models = {m["name"]: ModelInfo.from_dict(m) for m in message.header["models"]}
        self.environment = dict(message.header["environment"])
        self.generation += 1
        self._ready.set()
        _log.info("worker ready", pid=self.pid, models=sorted(self.models))
        if not self._first_start.done():
            self._first_start.set_result(None)

    def _give_up(self, text: str) -> None:
        """A service whose first worker can't start does not start either."""
        if not self._first_start.done():
            self._closing = True
            self._first_start.set_exception(OperationFailed(text, ErrorCategory.SERVER))

    def _reply(self, message: Message) -> None:
        call_id = message.header["id"]
        call = self._calls.get(call_id)
        if call is None:
            return
        call.resolve(message)
        if call.done.done():
            del self._calls[call_id]


def _how_it_ended(code: int, *, hung: bool, out_of_memory: bool) -> str:
    """In words that fit behind “the worker”."""
    if hung:
        return "hung: it made no step for too long, and was killed"
    if code == -signal.SIGKILL:
        return "ran out of memory and was killed" if out_of_memory else "was killed (SIGKILL)"
    if code < 0:
        return f"crashed ({signal.Signals(-code).name})"
    return f"ended with exit code {code}"
