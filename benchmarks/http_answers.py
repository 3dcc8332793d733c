"""HTTP: the time of an answer, idle and while another client sends passes of 64 MiB.

    python benchmarks/http_answers.py [--seconds 5]

The limit is an echo of asyncio's streams, measured in the same run. The passes wait for a sequence
id that never comes, so that nothing is computed.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from serving import serving

from everstep.wire.codecs import everstep_pb2

DATUMS, DATUM_TOKENS = 2050, 2000
LIMIT = 64 << 20
INTERVAL = 0.005
Times = tuple[float, float, float]


def round_trips(address: tuple[str, int], seconds: float) -> Times:
    """Median, 99th percentile and maximum, in ms, of requests on one connection.

    A request is due every `INTERVAL`, and its time counts from then: a stall delays all that were
    due in it. If each waited for the one before, a stall would be one time among thousands.
    """
    request = b"GET /api/v1/healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    times = []
    with socket.create_connection(address) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        begin = time.perf_counter()
        for number in range(int(seconds / INTERVAL)):
            due = begin + number * INTERVAL
            time.sleep(max(0.0, due - time.perf_counter()))
            sent = max(due, time.perf_counter()) if time.perf_counter() - due < INTERVAL else due
            connection.sendall(request)
            connection.recv(1 << 16)
            times.append((time.perf_counter() - sent) * 1e3)
    return float(np.median(times)), float(np.percentile(times, 99)), max(times)


def echo(seconds: float) -> Times:
    """The same of a server that sends back what it reads."""
    found: list[tuple[str, int]] = []
    started, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(1 << 16):
                writer.write(data)
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            found.append(server.sockets[0].getsockname())
            started.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    started.wait()
    times = round_trips(found[0], seconds)
    stop.set()
    thread.join()
    return times


def large_pass(run: str) -> Any:
    """A pass of almost 64 MiB: its body has to be within the service's limit."""
    message = everstep_pb2.ForwardBackwardRequest(model_id=run, loss_fn="cross_entropy")
    tokens = np.ones(DATUM_TOKENS, "<i4").tobytes()
    for _ in range(DATUMS):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = tokens
        for name, dtype, kind in [("target_tokens", 2, "<i8"), ("weights", 1, "<f4")]:
            tensor = datum.loss_fn_inputs[name]
            tensor.dtype, tensor.dense = dtype, np.ones(DATUM_TOKENS, kind).tobytes()
            tensor.shape.append(DATUM_TOKENS)
    return message


def send(url: str, run: str, accepted: Any) -> None:
    """Send one pass after the other, and count them, until this process is killed."""
    message = large_pass(run)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5, help="duration of each measurement")
    seconds = parser.parse_args().seconds
    rows = [("asyncio echo", *echo(seconds))]
    with tempfile.TemporaryDirectory(dir=".") as home, serving(Path(home) / "home") as served:
        url = httpx.URL(served.address)
        address = (url.host, url.port or 0)
        rows.append(("healthz, idle", *round_trips(address, seconds)))
        client = httpx.Client(base_url=f"{url}/api/v1", timeout=300)
        session = client.post("/create_session", json={}).json()["session_id"]
        body = {"session_id": session, "model_seq_id": 0, "base_model": "everstep/pico"}
        made = client.post("/create_model", json=body).json()["request_id"]
        run = client.post("/retrieve_future", json={"request_id": made}).json()["model_id"]
        processes = multiprocessing.get_context("spawn")
        accepted = processes.Value("i", 0)
        # A process of its own: it shares no interpreter with the measurement.
        sender = processes.Process(target=send, args=(f"{url}/api/v1", run, accepted))
        sender.start()
        while not accepted.value and sender.is_alive():
            time.sleep(0.1)
        before = accepted.value
        rows.append(("healthz, beside 64 MiB passes", *round_trips(address, seconds)))
        during = accepted.value - before
        sender.kill()
        sender.join()
    print(f"{during} passes were accepted during the last measurement")
    print(f"{'':<32}{'median ms':>10}{'ratio':>7}{'99 % ms':>9}{'ratio':>7}{'most ms':>9}")
    for name, median, worst, most in rows:
        ratios = median / rows[0][1], worst / rows[0][2]
        print(f"{name:<32}{median:10.2f}{ratios[0]:7.1f}{worst:9.2f}{ratios[1]:7.1f}{most:9.1f}")


if __name__ == "__main__":
    main()
