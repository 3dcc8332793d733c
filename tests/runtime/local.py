"""A whole service inside the test's process: fast, with every setting, and open to look into.

The worker is a thread behind the same socket. Its steps and its writes can be held back, so that
a test decides what happens first and never waits for time to pass.
"""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from starlette.testclient import TestClient

import everstep
import everstep.runtime.commands
from everstep.engine import Model, load_model
from everstep.engine.environment import environment
from everstep.engine.pico import write_pico
from everstep.runtime import Runtime, Settings
from everstep.runtime.channel import BlockingChannel, Message
from everstep.runtime.commands import Commands
from everstep.runtime.progress import ProgressPage
from everstep.runtime.turns import Turns
from everstep.runtime.worker_process import WorkerProcess
from everstep.server import create_app
from everstep.vault import Vault
from tests.scenario import MODEL, data


class Gate:
    """Holds back whoever comes through, while it is shut."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._reached = threading.Event()

    def pass_through(self) -> bool:
        """Wait until it is open; returns whether one may go on, or is to look at what came."""
        self._reached.set()
        assert self._open.wait(60), "nobody opened the gate"
        return True

    def knock(self) -> None:
        """Say that something came for who waits before it."""

    def wait_reached(self) -> None:
        """Wait until someone stands before it, or passed it, since it was shut."""
        assert self._reached.wait(60), "nobody came to the gate"

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


class _ThreadProcess:
    """A worker's thread, in the place of its process."""

    pid = 0
    returncode: int | None = None

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread

    async def wait(self) -> int:
        await asyncio.to_thread(self._thread.join)
        self.returncode = 0
        return 0

    def kill(self) -> None:
        raise AssertionError("a thread can't be killed")


class Local:
    """A service on a home, until the end of its `with` block.

    Args:
        home: everything it keeps; another one on it goes on with it.
        model: what it serves.
        name: under which name.
        settings: of the runtime.

    Attributes:
        steps: passed before every step of the worker; while it is shut, nothing is executed.
        writes: passed before a checkpoint is written.
        finished: the kinds and runs of the calls that the worker finished, in order.
        seconds: what the worker says that each call took; None: what it did take.
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
        self.steps = Gate()
        self.writes = Gate()
        self.finished: list[tuple[str, str]] = []
        self.seconds: float | None = None
        self._models = {name: model}
        self._settings = Settings(**settings)
        self._sequence: dict[str, int] = {}
        self._session: str | None = None
        self._runs = 0

    def __enter__(self) -> Local:
        local = self

        class Worker(WorkerProcess):
            async def _spawn(self, page: ProgressPage) -> Any:
                ours, theirs = socket.socketpair()
                thread = threading.Thread(target=local._work, args=(theirs, page))
                thread.start()
                reader, self._writer = await asyncio.open_connection(sock=ours)
                return reader, _ThreadProcess(thread)

        async def open_runtime() -> Runtime:
            with mock.patch("everstep.runtime.runtime.WorkerProcess", Worker):
                return await Runtime.open(
                    self.home, dict.fromkeys(self._models, ""), self._settings
                )

        write = everstep.runtime.commands.write_checkpoint

        def write_behind_the_gate(*arguments: Any) -> Any:
            self.writes.pass_through()
            return write(*arguments)

        self._patches = [
            mock.patch("everstep.runtime.commands.write_checkpoint", write_behind_the_gate),
        ]
        for patch in self._patches:
            patch.start()
        self.app = create_app(open_runtime)
        self.http = TestClient(self.app, base_url="http://test/api/v1")
        self.http.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.http.__exit__(None, None, None)
        for patch in self._patches:
            patch.stop()

    def after(self, **settings: Any) -> Local:
        """A service that goes on with this one's home, for the same client."""
        (name, model), *_ = self._models.items()
        other = Local(self.home, model, **{"name": name, **settings})
        other._sequence, other._session, other._runs = self._sequence, self._session, self._runs
        return other

    @contextmanager
    def killed(self) -> Iterator[Local]:
        """Run until the end of the block, and end without a snapshot, as by SIGKILL."""
        with mock.patch("everstep.runtime.execution.Execution.park", mock.AsyncMock()), self:
            yield self

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
        body = {"session_id": self.session(), "model_seq_id": self._runs, "base_model": MODEL}
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

    def _work(self, sock: socket.socket, page: ProgressPage) -> None:
        channel = BlockingChannel(sock)
        inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        ended = threading.Event()
        asked: dict[int, tuple[str, str]] = {}

        def read() -> None:
            while (message := channel.receive()) is not None:
                header = message.header
                asked.setdefault(header["id"], (header["command"], header.get("run", "")))
                inbox.put(message)
                self.steps.knock()
            ended.set()
            inbox.put(None)
            self.steps.open()

        def note(call_id: int, reply: Mapping[str, Any], body: bytes = b"") -> None:
            self.finished.append(asked[call_id])
            took = {} if self.seconds is None else {"seconds": self.seconds}
            finish(call_id, {**reply, **took}, body)

        turns, settings = Turns(page), self._settings
        vault = Vault(self.home / "vault", reserve_bytes=settings.disk_reserve_bytes)
        commands = self.commands = Commands(
            self._models, vault, channel, turns, settings.prefix_bytes
        )
        finish, commands._finish = commands._finish, note  # type: ignore[method-assign]
        threading.Thread(target=read, daemon=True).start()
        infos = [{**m.info.to_dict(), "name": name} for name, m in self._models.items()]
        with suppress(OSError):  # the service is gone
            channel.send({"event": "ready", "models": infos, "environment": environment()})
            while not ended.is_set():
                while not (turns.busy and inbox.empty()):
                    message = inbox.get()
                    if message is None:
                        return
                    commands.handle(message)
                if self.steps.pass_through() and not ended.is_set():
                    turns.step()


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
