"""A signal asks a command to stop and wakes its wait."""

from __future__ import annotations

import os
import signal
from threading import Thread

import pytest

from everstep.cli.train.interrupt import stop_requested


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_wait_and_every_later_one(number: signal.Signals) -> None:
    acknowledged: list[bool] = []
    with stop_requested(lambda: acknowledged.append(True)) as stop:
        assert not stop.wait(0)
        sender = Thread(target=os.kill, args=(os.getpid(), number))
        sender.start()
        assert stop.wait(60) and stop.wait(60)
        sender.join()
        assert stop.signal is number
        assert stop.exit_code == 128 + number
    assert acknowledged == [True]
