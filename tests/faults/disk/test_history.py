"""History: the states that are allowed after given reports."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from everstep.testing.history import History, Reporter, Value

OLD: Value = {"bytes": "old"}
NEW: Value = {"bytes": "new"}
BAD: Value = {"damaged": "torn"}


def history_of(program: Callable[[Reporter], None], *, unheard: int = 0) -> History:
    """Return the history of a program whose last lines were not heard."""
    lines: list[bytes] = []
    program(Reporter(lines.append))
    history = History()
    history.feed(lines[: len(lines) - unheard])
    history.feed(lines[len(lines) - unheard :], heard=False)
    return history


def save(reporter: Reporter) -> None:
    with reporter.doing({"x": OLD}):
        pass


def save_and_fail(reporter: Reporter) -> None:
    save(reporter)
    with pytest.raises(OSError), reporter.doing({"x": NEW}):
        raise OSError


def save_two_and_fail(reporter: Reporter) -> None:
    with reporter.doing({"x": OLD, "y": OLD}):
        pass
    with pytest.raises(OSError), reporter.doing({"x": NEW, "y": NEW}):
        raise OSError


def rules(history: History, found: dict[str, Value]) -> list[str]:
    return [each.rule for each in history.judge(found)]


def test_acknowledged_change_must_exist() -> None:
    history = history_of(save)
    assert rules(history, {"x": OLD}) == []
    assert rules(history, {}) == ["acknowledged and lost"]
    assert rules(history, {"x": NEW}) == ["not what was written"]
    assert rules(history, {"x": BAD}) == ["damaged"]
    assert rules(history, {"x": OLD, "y": OLD}) == ["there, and should not be"]


def test_unacknowledged_change_is_old_or_new() -> None:
    history = history_of(save_and_fail)
    assert rules(history, {"x": OLD}) == []
    assert rules(history, {"x": NEW}) == []
    assert rules(history, {}) == ["neither the old nor the new is there"]
    assert rules(history, {"x": BAD}) == ["damaged"]


def test_unheard_acknowledgement_does_not_count() -> None:
    history = history_of(save, unheard=1)
    assert rules(history, {"x": OLD}) == []
    assert rules(history, {}) == []


def test_change_of_two_things_is_atomic() -> None:
    history = history_of(save_two_and_fail)
    assert rules(history, {"x": OLD, "y": OLD}) == []
    assert rules(history, {"x": NEW, "y": NEW}) == []
    assert rules(history, {"x": OLD, "y": NEW}) == ["half of one change"]


def test_later_change_excludes_an_earlier_failed_one() -> None:
    def program(reporter: Reporter) -> None:
        save_and_fail(reporter)
        with reporter.doing({"x": None}):
            pass

    history = history_of(program)
    assert rules(history, {}) == []
    assert rules(history, {"x": NEW}) == ["there, and should not be"]
