"""HTTP: the time of an answer, idle and while another client sends passes of 64 MiB.

    python benchmarks/http_answers.py [--quick]

The floor is an echo of asyncio's streams in a process of its own, asked at the same time: beside
the passes it waits for the same busy cores. The passes wait for a sequence id that never comes, so
that nothing is computed.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from figures import Figure, run
from serving import serving

from everstep.wire.codecs import everstep_pb2

DATUMS, DATUM_TOKENS = 2050, 2000
LIMIT = 64 << 20
INTERVAL = 0.005
REQUEST = b"GET /api/v1/healthz HTTP/1.1\r\nHost: x\r\n\r\n"
PROCESSES = multiprocessing.get_context("spawn")
"""Of processes that share no interpreter with the measurement."""
Address = tuple[str, int]
Times = np.ndarray[Any, np.dtype[np.float64]]


def round_trips(address: Address, seconds: float) -> Times:
    """Return the milliseconds of requests on one connection.

    A request is due every `INTERVAL`, and its time counts from then: a stall delays all that were
    due in it. If each waited for the one before, a stall would be one time among thousands.
    """
    times = []
    with socket.create_connection(address) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        begin = time.perf_counter()
        for number in range(int(seconds / INTERVAL)):
            due = begin + number * INTERVAL
            time.sleep(max(0.0, due - time.perf_counter()))
            now = time.perf_counter()
            sent = now if now - due < INTERVAL else due  # a little late: by the timer
            connection.sendall(REQUEST)
            connection.recv(1 << 16)
            times.append((time.perf_counter() - sent) * 1e3)
    return np.array(times)


def both(service: Address, echo: Address, seconds: float) -> list[Times]:
    """Return the times of the service and of the echo, measured at the same time."""
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda each: round_trips(each, seconds), [service, echo]))


async def _echo(ready: Any) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        ready.send(server.sockets[0].getsockname())
        await server.serve_forever()


def echo(ready: Any) -> None:
    """Send back what comes, until this process is killed."""
    asyncio.run(_echo(ready))


def large_pass(run_id: str) -> Any:
    """A pass of almost 64 MiB: its body has to be within the service's limit."""
    message = everstep_pb2.ForwardBackwardRequest(model_id=run_id, loss_fn="cross_entropy")
    tokens = np.ones(DATUM_TOKENS, "<i4").tobytes()
    for _ in range(DATUMS):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = tokens
        for name, dtype, kind in [("target_tokens", 2, "<i8"), ("weights", 1, "<f4")]:
            tensor = datum.loss_fn_inputs[name]
            tensor.dtype, tensor.dense = dtype, np.ones(DATUM_TOKENS, kind).tobytes()
            tensor.shape.append(DATUM_TOKENS)
    return message


def send(url: str, run_id: str, accepted: Any) -> None:
    """Send one pass after the other, and count them, until this process is killed."""
    message = large_pass(run_id)
    headers = {"content-type": "application/x-protobuf"}
    with httpx.Client(base_url=url, timeout=300) as client:
        for seq_id in range(2, 10_000):
            message.seq_id = seq_id
            content = message.SerializeToString()
            if len(content) > LIMIT:
                raise ValueError(f"{len(content)} bytes are over the limit")
            client.post("/forward_backward", content=content, headers=headers).raise_for_status()
            with accepted.get_lock():
                accepted.value += 1


@contextmanager
def process(function: Any, *arguments: Any) -> Iterator[None]:
    """Run a function in a process, and kill that at the end of the block."""
    started = PROCESSES.Process(target=function, args=arguments)
    started.start()
    try:
        yield
    finally:
        started.kill()
        started.join()


def new_run(url: str) -> str:
    """Create a run of the built-in model."""
    with httpx.Client(base_url=url, timeout=300) as client:
        session = client.post("/create_session", json={}).json()["session_id"]
        body = {"session_id": session, "model_seq_id": 0, "base_model": "everstep/pico"}
        made = client.post("/create_model", json=body).json()["request_id"]
        found = client.post("/retrieve_future", json={"request_id": made}).json()["model_id"]
    return str(found)


def beside_passes(url: str, service: Address, echoing: Address, seconds: float) -> list[Times]:
    """Return the times of the service and of the echo while passes are sent."""
    accepted = PROCESSES.Value("i", 0)
    with process(send, url, new_run(url), accepted):
        deadline = time.monotonic() + 60
        while not accepted.value:
            if time.monotonic() > deadline:
                raise TimeoutError("no pass was accepted")
            time.sleep(0.01)
        before = accepted.value
        times = both(service, echoing, seconds)
        if accepted.value == before:
            raise TimeoutError("no pass was accepted during the measurement")
    return times


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Yield the figures."""
    seconds = 4 if arguments.quick else 15
    mine, theirs = PROCESSES.Pipe()
    with (
        process(echo, theirs),
        tempfile.TemporaryDirectory(dir=".") as home,
        serving(Path(home) / "home") as served,
    ):
        url = httpx.URL(served.address)
        service, echoing = (url.host, url.port or 0), mine.recv()
        idle, floor = both(service, echoing, seconds)
        yield _figure("median idle", np.median(idle), "echo, idle", np.median(floor))
        yield _figure("p99 idle", p99(idle), "echo, idle", p99(floor))
        loaded, floor = beside_passes(f"{url}/api/v1", service, echoing, 2 * seconds)
        beside = "beside 64 MiB passes"
        yield _figure(f"median {beside}", np.median(loaded), "healthz, idle", np.median(idle))
        yield _figure(f"p99 {beside}", p99(loaded), "healthz, idle", p99(idle), 2.0)
        yield _figure(f"p99 {beside}", p99(loaded), "echo beside them", p99(floor), 2.0)
        yield _figure(f"longest {beside}", loaded.max(), "echo beside them", floor.max())


def p99(times: Times) -> float:
    """Return the 99th percentile."""
    return float(np.percentile(times, 99))


def _figure(what: str, value: Any, peer: str, of_peer: Any, aim: float | None = None) -> Figure:
    return Figure(f"healthz, {what}", float(value), "ms", f"{peer}, ms", float(of_peer), aim)


if __name__ == "__main__":
    run(__doc__, measure)
