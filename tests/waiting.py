"""Bounded waits for what has no event: files, and the state of a service behind its routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

WAIT_SECONDS = 60.0
_POLL_SECONDS = 0.005


def eventually(what: str, condition: Callable[..., bool], seconds: float = WAIT_SECONDS) -> None:
    """Poll until a condition holds.

    Args:
        what: the condition in words, for the error.
        condition: called again and again, without arguments.
        seconds: how long to wait at most.

    Raises:
        AssertionError: it did not hold in time.
    """
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds:g} s for: {what}"
        time.sleep(_POLL_SECONDS)


async def eventually_async(
    what: str, condition: Callable[[], bool], seconds: float = WAIT_SECONDS
) -> None:
    """Poll in an event loop; see `eventually`."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds:g} s for: {what}"
        await asyncio.sleep(_POLL_SECONDS)
