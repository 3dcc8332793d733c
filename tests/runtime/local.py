"""Local: a whole service inside the test's process, fast, with every setting and open to inspect.

The worker is a thread behind the same socket. Gates hold back its steps and its writes, so that a
test decides the order of events and never waits for time to pass.
"""

from __future__ import annotations

import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from starlette.testclient import TestClient

import everstep
from everstep.engine import Model, load_model
from everstep.engine.environment import environment
from everstep.engine.models.pico import write_pico
from everstep.runtime import Runtime, Settings
from everstep.runtime.workers.supervisor import SupervisedPool
from everstep.runtime.workers.thread import ThreadHandle, ThreadLauncher
from everstep.server import create_app
from everstep.vault import Vault
from everstep.worker.checkpoint_io import write_checkpoint
from everstep.worker.commands import CheckpointWriter, Commands
from everstep.worker.protocol import messages
from everstep.worker.protocol.channel import NO_CALL, BlockingChannel, Envelope
from everstep.worker.protocol.codec import kind_of
from everstep.worker.protocol.heartbeat import HeartbeatPage
from everstep.worker.round_robin import RoundRobin, Task
from tests.scenario import MODEL, data


class Gate:
    """Blocks the threads that pass through it while it is shut."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._reached = threading.Event()

    def pass_through(self) -> bool:
        """Wait until it is open; returns whether to go on, or to handle new messages first."""
        self._reached.set()
        assert self._open.wait(60), "nobody opened the gate"
        return True

    def knock(self) -> None:
        """Called when a message arrives for the thread that waits at the gate."""

    def wait_reached(self) -> None:
        """Wait until a thread has reached the gate since it was shut."""
        assert self._reached.wait(60), "no thread reached the gate"

    def close(self) -> None:
        self._reached.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    @contextmanager
    def shut(self) -> Iterator[None]:
        self.close()
        try:
            yield
        finally:
            self.open()


class _Channel(BlockingChannel):
    """The worker's end of the socket; records which commands it replied to.

    Args:
        sock: the socket.
        local: the service whose worker it is.
    """

    def __init__(self, sock: socket.socket, local: Local) -> None:
        super().__init__(sock)
        self._local = local
        self._commands: dict[int, tuple[str, str]] = {}

    def receive(self) -> Envelope | None:
        envelope = super().receive()
        if envelope is not None:
            command = envelope.message
            run = command.run if isinstance(command, messages.RunCommand) else ""
            self._commands.setdefault(envelope.call_id, (kind_of(command), run))
            self._local.received.append((kind_of(command), run))
        return envelope

    def command(self, call_id: int) -> tuple[str, str]:
        """Kind and run of a call's command; samples are executed in batches, as no call's."""
        return self._commands.get(call_id, ("sample", ""))

    def send(self, call_id: int, message: messages.Message) -> None:
        if isinstance(message, messages.Reply):
            self._local.finished.append(self._commands[call_id])
            if self._local.seconds is not None:
                message = replace(message, seconds=self._local.seconds)
        super().send(call_id, message)


class _Tasks(RoundRobin):
    """The worker's queues; a test decides before each step whether its command may advance."""

    def __init__(self, page: HeartbeatPage, local: Local, channel: _Channel) -> None:
        super().__init__(page)
        self._local = local
        self._channel = channel

    def add(self, lane: str, call_id: int, task: Task) -> None:
        super().add(lane, call_id, self._held(*self._channel.command(call_id), task))

    def _held(self, kind: str, run: str, task: Task) -> Task:
        while True:
            if self._local.may_advance(kind, run):
                try:
                    next(task)
                except StopIteration:
                    return
            else:
                time.sleep(0.001)  # not to keep the interpreter from the service's thread
            yield


class Local:
    """A service on a home directory, for the duration of its `with` block.

    Args:
        home: everything it keeps; another service on it continues with it.
        model: the model that it serves.
        name: the name that it serves the model under.
        settings: of the runtime.

    Attributes:
        loading: passed before the worker becomes ready.
        steps: passed before every step of the worker; while it is shut, nothing is executed.
        writes: passed before a checkpoint is written.
        write_checkpoint: writes a checkpoint; a test may replace it. A write that waits at the
            gate keeps the function that it began with.
        may_advance: called with kind and run of a command as a step of it begins; False: it makes
            none this time. An exception ends the worker while it executes that command.
        received: kind and run of the commands that the worker received, in order.
        finished: kind and run of the calls that the worker replied to, in order.
        seconds: the computing time that the worker reports for each call; None: the real one.
        state_bytes: what the worker says that runs' states may take of its device.
        pool: its workers.
        commands: the worker that runs now.
    """

    def __init__(
        self,
        home: Path,
        model: Model,
        *,
        name: str = MODEL,
        **settings: Any,
    ) -> None:
        self.home = home
        self.loading = Gate()
        self.steps = Gate()
        self.writes = Gate()
        self.write_checkpoint: CheckpointWriter = write_checkpoint
        self.may_advance: Callable[[str, str], bool] = lambda kind, run: True
        self.received: list[tuple[str, str]] = []
        self.finished: list[tuple[str, str]] = []
        self.seconds: float | None = None
        self.state_bytes: int | None = None
        self._models = {name: model}
        self._settings = Settings(**settings)
        self._sequence: dict[str, int] = {}
        self._session: str | None = None
        self._runs = 0

    async def open_runtime(self) -> Runtime:
        """Open the runtime on the home, with the worker in a thread."""
        sources = dict.fromkeys(self._models, "")
        return await Runtime.open(self.home, sources, self._settings, open_pool=self._open_pool)

    def __enter__(self) -> Local:
        self.app = create_app(self.open_runtime)
        self.http = TestClient(self.app, base_url="http://test/api/v1")
        self.http.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.http.__exit__(None, None, None)

    def kill(self) -> None:
        """End the worker for good: the service can't record or snapshot anything any more."""
        assert self.http.portal is not None
        self.http.portal.call(self.pool.close)

    def lose_worker(self, number: int = signal.SIGKILL) -> None:
        """End the worker, as by a signal. Another one follows."""
        assert self.http.portal is not None
        handle = self.pool._handle
        assert isinstance(handle, ThreadHandle)
        self.http.portal.call(handle.kill, number)

    def crash_worker(self) -> NoReturn:
        """End the worker from the thread that writes its files. Another worker follows."""
        self.lose_worker(signal.SIGSEGV)
        raise SystemExit

    def after(self, **settings: Any) -> Local:
        """A service that goes on with this one's home, for the same client."""
        (name, model), *_ = self._models.items()
        other = Local(self.home, model, **{"name": name, **settings})
        other._sequence, other._session, other._runs = self._sequence, self._session, self._runs
        return other

    @contextmanager
    def killed(self) -> Iterator[Local]:
        """Run until the end of the block, and end without a snapshot, as by SIGKILL."""
        with self:
            yield self
            self.kill()

    # What a client does

    def post(self, route: str, headers: Mapping[str, str] | None = None, **body: Any) -> Any:
        """A request that succeeds."""
        answer = self.http.post(route, json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, route: str, **body: Any) -> tuple[int, str]:
        """A request that is refused: status and text."""
        answer = self.http.post(route, json=body)
        assert answer.status_code >= 400, answer.text
        return answer.status_code, answer.json()["detail"]

    def session(self, **body: Any) -> str:
        if self._session is None:
            self._session = str(self.post("create_session", **body)["session_id"])
        return self._session

    def new_run(self, seed: int = 1) -> str:
        """Create a run in the session, and wait for it."""
        body: dict[str, Any] = {
            "session_id": self.session(),
            "model_seq_id": self._runs,
            "base_model": MODEL,
        }
        self._runs += 1
        made = self.post("create_model", **body, lora_config={"rank": 4, "seed": seed})
        return str(self.result(made["request_id"])["model_id"])

    def send(self, run: str, route: str, seq_id: int | None = None, **body: Any) -> str:
        """Submit an operation of a run in its next place, or in the given one."""
        if seq_id is None:
            seq_id = self._sequence.get(run, 0) + 1
        self._sequence[run] = seq_id
        answer = self.post(route, model_id=run, seq_id=seq_id, **body)
        return str(answer["request_id"])

    def do(self, run: str, route: str, **body: Any) -> Any:
        """An operation's result."""
        return self.result(self.send(run, route, **body))

    def result(self, request_id: str) -> Any:
        """Poll until an operation is finished."""
        while True:
            answer = self.poll(request_id)
            if answer.status_code != 408:
                assert answer.status_code == 200, answer.text
                return answer.json()

    def poll(self, request_id: str, accept: str = "application/json", **body: Any) -> Any:
        """One poll."""
        content = {"request_id": request_id, **body}
        return self.http.post("retrieve_future", json=content, headers={"accept": accept})

    def step(self, run: str, shift: int = 0) -> list[str]:
        """Submit a pass and a step of the optimizer."""
        return [
            self.send(run, "forward_backward", forward_backward_input=batch(shift)),
            self.send(run, "optim_step", adam_params={"learning_rate": 0.01, "weight_decay": 0.1}),
        ]

    def train(self, run: str, *shifts: int) -> list[Any]:
        """Steps of training, and all that they gave."""
        return [self.result(each) for shift in shifts for each in self.step(run, shift)]

    # The worker

    def _open_pool(self, *_: Any) -> SupervisedPool:
        self.pool = SupervisedPool(ThreadLauncher(self.serve), self._settings.hang_seconds)
        return self.pool

    def serve(self, sock: socket.socket, page: HeartbeatPage) -> None:
        """The worker's thread: `everstep.worker.main`, with gates."""
        channel = _Channel(sock, self)
        inbox: queue.SimpleQueue[Envelope | None] = queue.SimpleQueue()
        ended = threading.Event()

        def read() -> None:
            while (envelope := channel.receive()) is not None:
                inbox.put(envelope)
                self.steps.knock()
            ended.set()
            inbox.put(None)
            self.steps.open()

        def write(*arguments: Any) -> dict[str, Any]:
            begun_with = self.write_checkpoint
            self.writes.pass_through()
            return begun_with(*arguments)

        tasks, settings = _Tasks(page, self, channel), self._settings
        vault = Vault(self.home / "vault", reserve_bytes=settings.disk_reserve_bytes)
        commands = self.commands = Commands(
            self._models, vault, self.home, channel, tasks, page, settings.prefix_bytes, write
        )
        threading.Thread(target=read, daemon=True).start()
        infos = [replace(model.info, name=name) for name, model in self._models.items()]
        self.loading.pass_through()
        with suppress(OSError):  # the service is gone
            ready = messages.Ready(infos, environment(), state_bytes=self.state_bytes)
            channel.send(NO_CALL, ready)
            while not ended.is_set():
                while not (tasks.busy and inbox.empty()):
                    envelope = inbox.get()
                    if envelope is None:
                        return
                    commands.handle(envelope)
                if self.steps.pass_through() and not ended.is_set():
                    tasks.step()


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The model, loaded once."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("models") / "pico"
    write_pico(directory)
    return load_model(MODEL, str(directory), device="cpu")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def batch(shift: int = 0, count: int = 2) -> dict[str, Any]:
    """A training pass, in JSON."""
    datums = [datum.model_dump(mode="json") for datum in data(everstep, count, shift)]
    return {"data": datums, "loss_fn": "cross_entropy"}
