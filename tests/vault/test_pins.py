"""Pins: a collection waits for the commands that it finds, and for no later one."""

from __future__ import annotations

import threading
from collections.abc import Callable

from everstep.vault.pins import Pins
from tests.waiting import eventually


def in_a_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    return thread, results


def test_wait_ends_with_the_commands_that_are_pinned_at_its_start() -> None:
    pins = Pins()
    first, second = pins.add(), pins.add()
    waiting = threading.Event()
    real = pins._changed.wait

    def wait(timeout: float | None = None) -> bool:
        waiting.set()
        return real(timeout)

    pins._changed.wait = wait  # type: ignore[method-assign]
    thread, results = in_a_thread(lambda: pins.wait(60))
    assert waiting.wait(60)
    later = pins.add()
    pins.remove(first)
    assert not results
    pins.remove(second)
    eventually("the wait has ended", lambda: results == [True])
    thread.join()
    assert pins.active == {later}


def test_wait_gives_up_when_a_command_goes_on() -> None:
    pins = Pins()
    with pins.held():
        assert not pins.wait(0)
    assert pins.wait(0) and not pins.active


def test_removing_a_pin_again_removes_no_other() -> None:
    pins = Pins()
    first = pins.add()
    pins.remove(first)
    second = pins.add()
    pins.remove(first)
    assert pins.active == {second}
