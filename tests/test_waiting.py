"""Waits end with what they waited for."""

from __future__ import annotations

import asyncio

import pytest

from tests.waiting import eventually, eventually_async


def test_wait_ends_as_its_condition_holds() -> None:
    states = iter([False, False, True])
    eventually("the third state", lambda: next(states))
    assert list(states) == []


def test_wait_that_fails_names_its_condition() -> None:
    with pytest.raises(AssertionError, match=r"waited 0\.01 s for: a file"):
        eventually("a file", lambda: False, 0.01)
    with pytest.raises(AssertionError, match=r"waited 0\.01 s for: a file"):
        asyncio.run(eventually_async("a file", lambda: False, 0.01))
