"""A small service that speaks the protocol, records every request and misbehaves as scripted.

It is a real HTTP/1.1 server on a loopback port, so a lost reply is a closed connection and not an
exception of a mock. It keeps the protocol's promises: an operation is identified by its run and
sequence id and is applied once, however often it arrives. It is executed once all operations before
it have arrived and were executed. Its result waits to be polled.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import h11
import numpy as np
from google.protobuf.json_format import MessageToDict
from tinker.proto import tinker_public_pb2 as official

from everstep.wire.codecs.proto import (
    PROTOBUF,
    encode_forward_backward_output,
    encode_sample_response,
)
from everstep.wire.messages.outputs import SampleOutput, SequenceOutput, Stop

PREFIX = "/api/v1"
MODEL = "fake/model"
OPERATIONS = (
    "/forward_backward",
    "/optim_step",
    "/save_weights",
    "/load_weights",
    "/save_weights_for_sampler",
    "/save_weights_external",
)
GIVE_UP_SECONDS = 10.0
"""Timeout after which a test fails."""


@dataclass(frozen=True)
class Recorded:
    """One request as it arrived.

    Attributes:
        path: without ``/api/v1``.
        headers: names in lower case.
        body: decoded JSON, or the fields of a protobuf message as the official SDK's codec reads
            them.
        size: bytes of the request, with its head.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: Any
    size: int

    @property
    def seq_id(self) -> int | None:
        """Its sequence id in its run or sampler."""
        return self.body.get("seq_id") if isinstance(self.body, dict) else None

    @property
    def key(self) -> str | None:
        """Its idempotency key."""
        return self.headers.get("x-idempotency-key")


@dataclass(frozen=True)
class Reply:
    """A response."""

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"

    @property
    def payload(self) -> bytes:
        """The bytes of the body."""
        if isinstance(self.body, bytes):
            return self.body
        return b"" if self.body is None else json.dumps(self.body).encode()


# Faults. Each is used for one request.


@dataclass(frozen=True)
class Lost:
    """The connection closes instead of a reply.

    Attributes:
        applied: whether the request has its effect.
        cut: whether a part of the reply is sent.
    """

    applied: bool = True
    cut: bool = False


@dataclass(frozen=True)
class Refused:
    """A reply with an error status. The request has no effect.

    Attributes:
        consumes: whether its sequence id counts as used all the same.
    """

    status: int
    body: Any = field(default_factory=lambda: {"detail": "scripted"})
    headers: Mapping[str, str] = field(default_factory=dict)
    consumes: bool = False


@dataclass(frozen=True)
class Answered:
    """A reply that the test gives. The request has no effect."""

    reply: Reply


@dataclass
class Held:
    """The request waits before it has its effect, until the test releases it."""

    arrived: threading.Event = field(default_factory=threading.Event)
    gate: threading.Event = field(default_factory=threading.Event)

    def wait_for_arrival(self) -> None:
        """Wait until a request is held."""
        assert self.arrived.wait(GIVE_UP_SECONDS), "no request was held"

    def release(self) -> None:
        """Let the request through."""
        self.gate.set()


Fault = Lost | Refused | Answered | Held
Where = Callable[[Recorded], bool]


def try_again(status: int = 200) -> Answered:
    """A poll's reply: not finished yet."""
    body = {"type": "try_again", "request_id": "r", "queue_state": "active"}
    return Answered(Reply(status, body))


def metadata(size: int = 10) -> Answered:
    """A poll's reply: finished, with the size of the result."""
    body = {"status": "complete_metadata", "response_payload_size": size}
    return Answered(Reply(200, body))


def failed(message: str, category: Any = "user") -> Answered:
    """A poll's reply: the operation failed."""
    body = {"error": message} | ({} if category is None else {"category": category})
    return Answered(Reply(200, body))


@dataclass
class Operation:
    """An accepted operation."""

    request_id: str
    path: str
    run: str
    seq_id: int | None
    body: Any
    reply: Reply


class FakeService:
    """The service. Use as a context manager.

    Attributes:
        requests: every request in the order of arrival.
        applied: the operations in the order of execution.
        config: the flags that clients get.
    """

    def __init__(self) -> None:
        self.requests: list[Recorded] = []
        self.applied: list[Operation] = []
        self.config: dict[str, Any] = {}
        self.url = ""
        self._errors: list[Exception] = []
        self._lock = threading.Lock()
        self._faults: list[tuple[str, Where, Fault]] = []
        self._operations: dict[str, Operation] = {}
        self._by_key: dict[tuple[str, str, int], Operation] = {}
        self._consumed: dict[str, set[int]] = defaultdict(set)
        self._executed: dict[str, int] = defaultdict(int)
        self._held_results: set[tuple[str, int]] = set()
        self._sessions: dict[str, str] = {}
        self._numbers = itertools.count()
        self._changed: asyncio.Condition
        self._stop: asyncio.Event
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fake service", daemon=True)

    # Used by tests

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(GIVE_UP_SECONDS)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(GIVE_UP_SECONDS)
        if self._errors:
            raise self._errors[0]

    def script(self, path: str, *faults: Fault, where: Where = lambda request: True) -> None:
        """Apply faults, in order, to the requests to a path that match a condition."""
        with self._lock:
            self._faults += [(path, where, fault) for fault in faults]

    def hold_result(self, seq_id: int, run: str = "session-0:train:0") -> None:
        """Do not finish an operation yet. Later ones wait as well."""
        with self._lock:
            self._held_results.add((run, seq_id))

    def release_result(self, seq_id: int, run: str = "session-0:train:0") -> None:
        """Finish a held operation."""

        async def release() -> None:
            with self._lock:
                self._held_results.discard((run, seq_id))
            await self._advance(run)

        asyncio.run_coroutine_threadsafe(release(), self._loop).result(GIVE_UP_SECONDS)

    def to(self, path: str) -> list[Recorded]:
        """Return the requests to a path, in the order of arrival."""
        with self._lock:
            return [request for request in self.requests if request.path == path]

    def arrived(self, path: str, count: int = 1) -> list[Recorded]:
        """Wait for a number of requests to a path."""

        async def wait() -> None:
            async with self._changed:
                await self._changed.wait_for(lambda: len(self.to(path)) >= count)

        waiting = asyncio.run_coroutine_threadsafe(wait(), self._loop)
        waiting.result(GIVE_UP_SECONDS)
        return self.to(path)

    def submits(self) -> list[tuple[str, int]]:
        """Return path and sequence id of every operation, in the order of arrival."""
        with self._lock:
            return [
                (request.path, request.seq_id or 0)
                for request in self.requests
                if request.path in OPERATIONS
            ]

    def applied_ids(self) -> list[int]:
        """Return the sequence ids of the operations, in the order of execution."""
        return [operation.seq_id or 0 for operation in self.applied]

    def polls_of(self, seq_id: int | None, path: str | None = None) -> Where:
        """Return a condition: a request polls the operation with a sequence id."""

        def asks(request: Recorded) -> bool:
            operation = self._operations.get(request.body["request_id"])
            known = OPERATIONS if path is None else (path,)
            return operation is not None and (operation.seq_id, operation.path in known) == (
                seq_id,
                True,
            )

        return asks

    def unused_faults(self) -> int:
        """Return the number of faults that no request has used."""
        return len(self._faults)

    # The server

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._changed, self._stop = asyncio.Condition(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        server.close()
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER)
        with self._recording_errors():
            while (request := await _read(connection, reader)) is not None:
                reply = await self._handle(request)
                if reply is None:
                    break
                for event in _events(reply):
                    writer.write(connection.send(event) or b"")
                await writer.drain()
                if isinstance(reply, _Cut) or connection.our_state is not h11.DONE:
                    break
                connection.start_next_cycle()
        writer.close()

    @contextlib.contextmanager
    def _recording_errors(self) -> Iterator[None]:
        try:
            yield
        except (ConnectionError, asyncio.CancelledError, h11.ProtocolError):
            return
        except Exception as error:  # noqa: BLE001  raised at the end
            self._errors.append(error)

    async def _handle(self, request: Recorded) -> Reply | None:
        """Return the reply. None closes the connection without one."""
        async with self._changed:
            with self._lock:
                self.requests.append(request)
            self._changed.notify_all()
        fault = self._fault(request)
        match fault:
            case None:
                return await self._answer(request)
            case Held():
                fault.arrived.set()
                await asyncio.to_thread(fault.gate.wait, GIVE_UP_SECONDS)
                return await self._answer(request)
            case Lost(applied=applied, cut=cut):
                reply = await self._answer(request) if applied else Reply(200, {})
                return _Cut(**vars(reply)) if cut else None
            case Refused():
                if fault.consumes and request.path in OPERATIONS and request.seq_id:
                    await self._consume(request.body["model_id"], request.seq_id)
                return Reply(fault.status, fault.body, fault.headers)
            case Answered():
                return fault.reply

    def _fault(self, request: Recorded) -> Fault | None:
        with self._lock:
            for index, (path, where, fault) in enumerate(self._faults):
                if path == request.path and where(request):
                    del self._faults[index]
                    return fault
        return None

    # The protocol

    async def _answer(self, request: Recorded) -> Reply:
        path, body = request.path, request.body
        if path in OPERATIONS and "model_id" in body:
            return await self._submit(request)
        match path:
            case "/client/config":
                return Reply(body=self.config)
            case "/client/dynamic_config" | "/session_heartbeat":
                return Reply(body={"type": "session_heartbeat"} if "heartbeat" in path else {})
            case "/telemetry":
                return Reply(body={"status": "accepted"})
            case "/create_session":
                session_key = request.key or f"no key {next(self._numbers)}"
                session = self._sessions.setdefault(session_key, f"session-{len(self._sessions)}")
                return Reply(body={"session_id": session, "type": "create_session"})
            case "/create_model" | "/load_weights":
                run = f"{body['session_id']}:train:{body['model_seq_id']}"
                result = {"model_id": run, "type": path[1:]}
                return self._created(("create", run, 0), request, run, Reply(body=result))
            case "/get_info":
                data = {"model_name": MODEL}
                info = {"model_id": body["model_id"], "model_data": data, "model_name": MODEL}
                return Reply(body=info | {"type": "get_info"})
            case "/create_sampling_session":
                sampler = f"{body['session_id']}:sample:{body['sampling_session_seq_id']}"
                return Reply(body={"sampling_session_id": sampler})
            case "/asample":
                key = (body["sampling_session_id"], "sample", body["seq_id"])
                return self._created(key, request, body["sampling_session_id"], _sampled(body))
            case "/retrieve_future":
                return await self._retrieve(body["request_id"])
            case "/weights_info":
                return Reply(body={"base_model": MODEL, "is_lora": True, "lora_rank": 4})
            case "/get_server_capabilities":
                return Reply(body={"supported_models": [{"model_name": MODEL}]})
        if path.startswith("/samplers/"):
            return Reply(body={"sampler_id": path.split("/")[-1], "base_model": MODEL})
        if path.startswith("/sessions/") and path.endswith("/finish"):
            return Reply(body={})
        if path.endswith("/checkpoints"):
            return Reply(body={"checkpoints": []})
        if path.startswith("/training_runs/"):
            return Reply(204)
        return Reply(404, {"detail": f"no {path}"})

    async def _submit(self, request: Recorded) -> Reply:
        """Accept an operation of a run, once."""
        run, seq_id = request.body["model_id"], request.body["seq_id"]
        key = (run, "train", seq_id)
        reply = self._created(key, request, run, self._result(request))
        await self._consume(run, seq_id)
        return reply

    def _created(
        self, key: tuple[str, str, int], request: Recorded, run: str, result: Reply
    ) -> Reply:
        with self._lock:
            operation = self._by_key.get(key)
            if operation is None:
                number = f"request-{len(self._operations)}"
                seq_id = request.body.get("seq_id")
                operation = Operation(number, request.path, run, seq_id, request.body, result)
                self._operations[number] = self._by_key[key] = operation
                if key[1] != "train":
                    self.applied.append(operation)
        answer: dict[str, Any] = {"request_id": operation.request_id}
        if request.path == "/asample":
            count = request.body.get("num_samples", 1)
            answer["sample_sequence_ids"] = [f"{operation.request_id}/{i}" for i in range(count)]
        return Reply(body=answer)

    async def _consume(self, run: str, seq_id: int) -> None:
        with self._lock:
            self._consumed[run].add(seq_id)
        await self._advance(run)

    async def _advance(self, run: str) -> None:
        """Execute the operations that have all earlier ones."""
        async with self._changed:
            with self._lock:
                while True:
                    following = self._executed[run] + 1
                    if following not in self._consumed[run]:
                        break
                    if (run, following) in self._held_results:
                        break
                    self._executed[run] = following
                    operation = self._by_key.get((run, "train", following))
                    if operation is not None:
                        self.applied.append(operation)
            self._changed.notify_all()

    async def _retrieve(self, request_id: str) -> Reply:
        operation = self._operations.get(request_id)
        if operation is None:
            return Reply(404, {"detail": "no such future"})

        def executed() -> bool:
            return operation in self.applied

        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(executed), GIVE_UP_SECONDS)
            except TimeoutError:
                return Reply(408, {"type": "try_again", "request_id": request_id})
        return operation.reply

    def _result(self, request: Recorded) -> Reply:
        body, run = request.body, request.body["model_id"]
        match request.path:
            case "/forward_backward":
                return _passed(body)
            case "/optim_step":
                return Reply(body={"metrics": {"step:max": float(body["seq_id"])}})
            case "/save_weights":
                path = f"tinker://{run}/weights/{body.get('path', 'unnamed')}"
                return Reply(body={"path": path, "type": "save_weights"})
            case "/load_weights":
                return Reply(body={"path": body["path"], "model_id": run})
            case _ if body.get("path"):
                kind = "external" if "external" in request.path else "sampler"
                return Reply(body={"path": f"tinker://{run}/{kind}_weights/{body['path']}"})
            case _:
                session = run.split(":")[0]
                sampler = f"{session}:sample:{body['sampling_session_seq_id']}"
                return Reply(body={"sampling_session_id": sampler})


class _Cut(Reply):
    """A reply whose end is cut off."""


def logprob(token: int) -> float:
    """Return the logprob that the fake's model gives a target."""
    return -0.25 * (1 + token % 7)


def _passed(body: Mapping[str, Any]) -> Reply:
    """Return logprobs computed from the targets, and the metrics of a loss."""
    outputs, loss = [], 0.0
    for datum in body.get("data", []):
        targets = datum["loss_fn_inputs"]["target_tokens"]
        weights = datum["loss_fn_inputs"].get("weights")
        logprobs = np.asarray([logprob(token) for token in targets], dtype=np.float32)
        outputs.append({"logprobs": logprobs})
        loss -= float((logprobs * (1.0 if weights is None else np.asarray(weights))).sum())
    metrics = {"loss:sum": loss, "size:max": float(len(outputs)), "size:mean": float(len(outputs))}
    content = encode_forward_backward_output(outputs, metrics)
    return Reply(body=content, content_type=PROTOBUF)


def _sampled(body: Mapping[str, Any]) -> Reply:
    length = sum(len(chunk.get("tokens", ())) for chunk in body["prompt"]["chunks"])
    sequence = SequenceOutput(
        np.arange(3, dtype=np.int32), np.full(3, -0.5, dtype=np.float32), Stop.LENGTH
    )
    scored = np.asarray([np.nan] + [-0.5] * (length - 1), dtype=np.float32)
    output = SampleOutput(
        sequences=[sequence] * body.get("num_samples", 1),
        prompt_logprobs=scored if body.get("prompt_logprobs") else None,
    )
    return Reply(body=encode_sample_response(output), content_type=PROTOBUF)


async def _read(connection: h11.Connection, reader: asyncio.StreamReader) -> Recorded | None:
    """Read the next request. None at the connection's end."""
    head: h11.Request | None = None
    parts: list[bytes] = []
    size = 0
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            received = await reader.read(1 << 16)
            size += len(received)
            connection.receive_data(received)
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            parts.append(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            return _recorded(head, b"".join(parts), size)
        else:
            return None


def _recorded(head: h11.Request, content: bytes, size: int) -> Recorded:
    headers = {name.decode(): value.decode() for name, value in head.headers}
    path, _, query = head.target.decode().partition("?")
    assert path.startswith(PREFIX), path
    path = path.removeprefix(PREFIX)
    body: Any = None
    if headers.get("content-type", "").startswith(PROTOBUF):
        assert path == "/forward_backward"
        body = _pass_fields(content)
    elif content:
        body = json.loads(content)
    return Recorded(head.method.decode(), path, query, headers, body, size)


_NUMPY = {official.DTYPE_FLOAT32: np.float32, official.DTYPE_INT64: np.int64}


def _pass_fields(content: bytes) -> dict[str, Any]:
    """Decode a training pass with the official SDK's codec."""
    message = official.ForwardBackwardRequest.FromString(content)
    data = []
    for datum in message.data:
        inputs = {}
        for name, tensor in datum.loss_fn_inputs.items():
            kind = _NUMPY[tensor.dtype]
            if not tensor.HasField("sparse_csr"):
                inputs[name] = np.frombuffer(tensor.dense, kind).tolist()
            else:
                inputs[name] = MessageToDict(tensor)
        tokens: list[Any] = []
        for chunk in datum.model_input:
            if chunk.WhichOneof("chunk") == "encoded_text":
                tokens += np.frombuffer(chunk.encoded_text.tokens, np.int32).tolist()
            else:
                tokens.append(MessageToDict(chunk))
        shapes = {name: list(tensor.shape) for name, tensor in datum.loss_fn_inputs.items()}
        data.append({"tokens": tokens, "loss_fn_inputs": inputs, "shapes": shapes})
    return {
        "model_id": message.model_id,
        "seq_id": message.seq_id,
        "data": data,
        "loss_fn": message.loss_fn,
        "forward_only": message.forward_only,
        "loss_fn_config": dict(message.loss_fn_config),
        "loss_fn_config_v2": {
            key: value.text if value.WhichOneof("value") == "text" else value.number
            for key, value in message.loss_fn_config_v2.items()
        },
    }


def _events(reply: Reply) -> Iterator[h11.Event]:
    payload = reply.payload
    headers = [("content-length", str(len(payload))), *reply.headers.items()]
    if payload:
        headers.append(("content-type", reply.content_type))
    yield h11.Response(status_code=reply.status, headers=headers)
    if isinstance(reply, _Cut):
        yield h11.Data(data=payload[: len(payload) // 2])
        return
    if payload:
        yield h11.Data(data=payload)
    yield h11.EndOfMessage()
