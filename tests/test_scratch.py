"""The place of the tests' temporary directories."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from tests import scratch

NOTHING: dict[str, str] = {}


def chosen(
    monkeypatch: pytest.MonkeyPatch, free: int, given: dict[str, str], basetemp: str | None = None
) -> str | None:
    """Return the temporary root after the choice on a machine with that much free memory."""
    environment = dict(given)
    monkeypatch.setattr(scratch, "free_bytes", lambda: free)
    monkeypatch.setattr(os, "environ", environment)
    config: Any = SimpleNamespace(option=SimpleNamespace(basetemp=basetemp))
    scratch.choose(config)
    return environment.get(scratch.VARIABLE)


def test_temporary_directories_lie_in_memory_where_there_is_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    enough = scratch.MIN_FREE_BYTES
    assert chosen(monkeypatch, enough, NOTHING) == str(scratch.MEMORY)
    assert chosen(monkeypatch, enough - 1, NOTHING) is None


def test_given_place_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    enough = scratch.MIN_FREE_BYTES
    assert chosen(monkeypatch, enough, {scratch.VARIABLE: "/x"}) == "/x"
    assert chosen(monkeypatch, enough, {"TMPDIR": "/x"}) is None
    assert chosen(monkeypatch, enough, NOTHING, basetemp="/x") is None
