"""Fixtures: a scripted service, and clients of it that don't sleep between attempts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

import everstep
from everstep.client._transport import http
from everstep.client._transport.http import Http
from tests.client.fake_service import GIVE_UP_SECONDS, MODEL, FakeService


@dataclass
class Clock:
    """Time that only passes by waiting.

    Attributes:
        waits: the client's waits in seconds.
    """

    waits: list[float] = field(default_factory=list)
    now: float = 1000.0

    async def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def fake() -> Iterator[FakeService]:
    with FakeService() as service:
        yield service


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The client's clock. No wait sleeps."""
    clock = Clock()
    monkeypatch.setattr(http, "monotonic", clock.monotonic)
    monkeypatch.setattr(Http, "wait", lambda self, seconds: clock.wait(seconds))
    return clock


@pytest.fixture
def client(fake: FakeService, clock: Clock) -> Iterator[everstep.ServiceClient]:
    service = everstep.ServiceClient(base_url=fake.url, api_key="tml-test")
    yield service
    service.close().result(GIVE_UP_SECONDS)


@pytest.fixture
def run(client: everstep.ServiceClient) -> Any:
    """A run without any operation."""
    return client.create_lora_training_client(MODEL, rank=4, seed=1).result(GIVE_UP_SECONDS)
