"""Pins: every save is pinned before it reaches a worker, and no pin outlives its save."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from everstep.engine import Model
from everstep.ledger import Ledger, pins
from tests.runtime.local import Local


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pins that were added."""
    found: list[str] = []
    add = pins.Pins.add

    async def recorded(self: pins.Pins, pin: str) -> None:
        await add(self, pin)
        found.append(pin)

    monkeypatch.setattr(pins.Pins, "add", recorded)
    return found


def active(home: Path) -> frozenset[str]:
    """The pins in a home's ledger."""

    async def read() -> frozenset[str]:
        ledger = await Ledger.open(home / "ledger.sqlite")
        try:
            return await ledger.pins.active()
        finally:
            await ledger.close()

    return asyncio.run(read())


def test_save_is_pinned_until_its_operation_ends(home: Path, pico: Model, added: list[str]) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        service.train(run, 0)
        before = len(added)
        assert "path" in service.do(run, "save_weights", path="a")
        assert "path" in service.do(run, "save_weights_for_sampler", path="a")
        assert "error" in service.do(run, "save_weights", path="a")
        assert len([pin for pin in added[before:] if not pin.startswith("snapshot")]) == 2
    assert [pin for pin in added if pin.startswith("snapshot")], "a stop takes a snapshot"
    assert not {pin for pin in active(home) if not pin.startswith("snapshot")}


def test_start_removes_pins_of_an_earlier_process(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        service.new_run()

    async def pin() -> None:
        ledger = await Ledger.open(home / "ledger.sqlite")
        await ledger.pins.add("of a process that died")
        await ledger.close()

    asyncio.run(pin())
    assert "of a process that died" in active(home)
    soon: dict[str, Any] = {"collect_grace_seconds": 0.0}
    with Local(home, pico, **soon) as service:
        done = service.http.post("everstep/vault/collect", json={"grace_seconds": 0})
        assert done.status_code == 200, done.text
    assert "of a process that died" not in active(home)
