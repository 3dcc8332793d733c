"""Pins of commands that write to the vault: from before they are sent until they have ended."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from everstep.runtime.workers.base import Call
from everstep.vault.pins import Pins
from everstep.worker.protocol.messages import Reply

R = TypeVar("R", bound=Reply)


async def send_pinned(pins: Pins, send: Callable[[], Awaitable[Call[R]]]) -> Call[R]:
    """Send a command whose files garbage collection leaves alone until it ends.

    Args:
        pins: where it is pinned until the worker has replied or is gone.
        send: sends it.
    """
    pin = pins.add()
    try:
        call = await send()
    except BaseException:
        pins.remove(pin)
        raise
    call.done.add_done_callback(lambda _: pins.remove(pin))
    return call
