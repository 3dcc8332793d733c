"""Outage log: callers that wait for an unresponsive service get one warning."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import everstep
from tests.client.fake_service import GIVE_UP_SECONDS, FakeService, Fault, Lost

ADAM = everstep.AdamParams(learning_rate=0.1)


@pytest.mark.parametrize("path", ["/optim_step", "/retrieve_future"], ids=["submit", "poll"])
@pytest.mark.parametrize("lost", [Lost(), Lost(cut=True), Lost(applied=False)], ids=repr)
def test_outage_and_its_end_are_logged_once(
    fake: FakeService, run: Any, caplog: pytest.LogCaptureFixture, path: str, lost: Fault
) -> None:
    fake.script(path, *[lost] * 8)
    run.optim_step(ADAM).result(GIVE_UP_SECONDS)
    began, ended = warnings(caplog)
    assert began.startswith(f"no response from {fake.url} for ")
    assert ended.startswith(f"{fake.url} responds again after ")
    run.optim_step(ADAM).result(GIVE_UP_SECONDS)
    assert len(warnings(caplog)) == 2


def test_short_outage_is_not_logged(
    fake: FakeService, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fake.script("/optim_step", Lost(), Lost())
    run.optim_step(ADAM).result(GIVE_UP_SECONDS)
    assert warnings(caplog) == []


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "everstep.client" and record.levelno >= logging.WARNING
    ]
