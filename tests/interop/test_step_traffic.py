"""A step of the official client on the wire: its requests and bytes, which no clock disturbs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import httpx
import pytest
import tinker

from tests.conftest import Service
from tests.scenario import MODEL, connect, data

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

STEPS = 5
PASS_BYTES = 1_500
"""A pass of three short datums and what names it."""
MESSAGE_BYTES = 250
"""A step of the optimizer, or a poll."""
ANSWER_BYTES = 400


class Traffic:
    """Requests by route, and the bytes of bodies, of all clients in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        send = httpx.AsyncClient.send

        async def counted(client: httpx.AsyncClient, request: httpx.Request, **options: Any) -> Any:
            response = await send(client, request, **options)
            route = request.url.path.rsplit("/", 1)[-1]
            self.requests[route] += 1
            self.sent[route] += int(request.headers.get("content-length", 0))
            self.received[route] += int(response.headers.get("content-length", 0))
            return response

        monkeypatch.setattr(httpx.AsyncClient, "send", counted)


def test_awaited_step_is_two_requests_and_their_polls(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = connect(tinker, service.url).create_lora_training_client(MODEL, rank=8, seed=3).result()
    datums, adam = data(tinker), tinker.AdamParams(learning_rate=0.01)

    def step() -> None:
        run.forward_backward(datums, "cross_entropy").result()
        run.optim_step(adam).result()

    step()
    traffic = Traffic(monkeypatch)
    for _ in range(STEPS):
        step()
    assert traffic.requests["forward_backward"] == STEPS
    assert traffic.requests["optim_step"] == STEPS
    # A poll waits at the service until the result is there. Each answers one operation.
    assert traffic.requests["retrieve_future"] == 2 * STEPS
    assert traffic.sent["forward_backward"] <= PASS_BYTES * STEPS
    assert traffic.sent["optim_step"] <= MESSAGE_BYTES * STEPS
    assert traffic.sent["retrieve_future"] <= MESSAGE_BYTES * 2 * STEPS
    received = traffic.received["forward_backward"] + traffic.received["optim_step"]
    assert 0 < received <= MESSAGE_BYTES * 2 * STEPS
    assert 0 < traffic.received["retrieve_future"] <= ANSWER_BYTES * 2 * STEPS
    others = set(traffic.requests) - {"forward_backward", "optim_step", "retrieve_future"}
    assert others <= {"session_heartbeat", "telemetry"}, "which take turns of their own"
