"""Who waits for a service that does not answer is told so, once."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import everstep
from tests.client.fake_service import GIVE_UP_SECONDS, FakeService, Fault, Lost

ADAM = everstep.AdamParams(learning_rate=0.1)


@pytest.mark.parametrize("path", ["/optim_step", "/retrieve_future"], ids=["submit", "poll"])
@pytest.mark.parametrize("lost", [Lost(), Lost(cut=True), Lost(applied=False)], ids=repr)
def test_a_long_silence_and_its_end_are_told_once(
    fake: FakeService, run: Any, caplog: pytest.LogCaptureFixture, path: str, lost: Fault
) -> None:
    fake.script(path, *[lost] * 8)
    run.optim_step(ADAM).result(GIVE_UP_SECONDS)
    silent, over = told(caplog)
    assert silent.startswith(f"no answer from {fake.url} for ")
    assert over.startswith(f"{fake.url} answers again, after ")
    run.optim_step(ADAM).result(GIVE_UP_SECONDS)
    assert len(told(caplog)) == 2


def test_a_short_silence_is_nothing_to_tell(
    fake: FakeService, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fake.script("/optim_step", Lost(), Lost())
    run.optim_step(ADAM).result(GIVE_UP_SECONDS)
    assert told(caplog) == []


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "everstep.client" and record.levelno >= logging.WARNING
    ]
