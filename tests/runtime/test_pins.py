"""Pins: a save is pinned from before it reaches a worker until it ends, however it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from everstep.engine import Model
from everstep.runtime.maintenance import gc
from everstep.vault.pins import Pins
from tests.runtime.local import Local
from tests.waiting import eventually


@pytest.fixture
def pins(monkeypatch: pytest.MonkeyPatch) -> list[Pins]:
    """The pins of the service, once for each pin that was added."""
    found: list[Pins] = []
    add = Pins.add

    def recorded(self: Pins) -> int:
        found.append(self)
        return add(self)

    monkeypatch.setattr(Pins, "add", recorded)
    return found


def collect(service: Local) -> int:
    answer = service.http.post("everstep/vault/collect", json={"grace_seconds": 0})
    return int(answer.status_code)


def test_every_save_and_snapshot_is_pinned_and_no_pin_is_left(
    home: Path, pico: Model, pins: list[Pins]
) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        service.train(run, 0)
        before = len(pins)
        assert "path" in service.do(run, "save_weights", path="a")
        assert "path" in service.do(run, "save_weights_for_sampler", path="a")
        assert "error" in service.do(run, "save_weights", path="a")
        assert len(pins) == before + 2
        service.train(run, 1)
    assert len(pins) == before + 3, "a stop takes a snapshot"
    assert not pins[0].active


@pytest.mark.parametrize("end", ["saved", "failed", "lost"])
def test_collection_waits_for_a_save_until_it_ends(
    home: Path, pico: Model, pins: list[Pins], monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(gc, "PIN_TIMEOUT", 0.0)

    def fail(*_: Any) -> dict[str, Any]:
        raise OSError("no")

    with Local(home, pico) as service:
        run = service.new_run()
        service.train(run, 0)
        assert collect(service) == 200
        if end == "failed":
            service.write_checkpoint = fail
        with service.writes.shut():
            saving = service.send(run, "save_weights", path="a")
            service.writes.wait_reached()
            assert collect(service) == 503
            assert pins[-1].active
            if end == "lost":
                service.lose_worker()
        result = service.result(saving)
        assert ("error" in result) == (end == "failed")
        eventually("no pin is left", lambda: not pins[-1].active)
        assert collect(service) == 200
