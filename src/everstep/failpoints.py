"""Failpoints: named places in the service at which a test makes a process fail.

A room makes its failpoints where it is imported and calls them where something could go wrong:

    _SYNCED = Failpoint("vault.write.synced", "a file's content is durable, its name is not there")
    ...
    _SYNCED()

They do nothing unless the environment arms them when the process starts:

    EVERSTEP_FAILPOINTS       name=action[@n][;name=action[@n]]…
                              at the n-th call (default 1) of that name in this process
    EVERSTEP_FAILPOINTS_ONCE  a directory: one that fired leaves a file there and fires no more,
                              in whichever process it is

Actions: ``kill`` (SIGKILL to the process), ``hang`` (for ever), ``error:ENAME`` (raise OSError).
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

VARIABLE = "EVERSTEP_FAILPOINTS"
ONCE_VARIABLE = "EVERSTEP_FAILPOINTS_ONCE"


@dataclass
class _Arming:
    action: str
    remaining: int


class Failpoint:
    """A named place. Calling it costs a look at a flag unless it is armed.

    Args:
        name: ``room.what.when``.
        meaning: what is done and what isn't when a process fails here.
    """

    def __init__(self, name: str, meaning: str) -> None:
        if name in _registry:
            raise ValueError(f"there are two failpoints {name!r}")
        self.name = name
        self.meaning = meaning
        self._arming = _armings.get(name)
        _registry[name] = self

    def __call__(self) -> None:
        """Fail here, if that is armed."""
        if self._arming is not None:
            _hit(self.name, self._arming)


_registry: dict[str, Failpoint] = {}
_lock = threading.Lock()


def registered() -> dict[str, str]:
    """Meaning by name, of all failpoints of the rooms that are imported."""
    return {name: point.meaning for name, point in sorted(_registry.items())}


def parse(text: str) -> dict[str, tuple[str, int]]:
    """Read what the variable holds: action and count by name.

    Raises:
        ValueError: it can't be read.
    """
    armed = {}
    for part in filter(None, (item.strip() for item in text.split(";"))):
        name, equals, rest = part.partition("=")
        action, _, count = rest.partition("@")
        known = action in ("kill", "hang") or (
            action.startswith("error:") and hasattr(errno, action.removeprefix("error:"))
        )
        if not name or not equals or not known or not (count or "1").isdecimal():
            raise ValueError(f"{VARIABLE}: {part!r} is not name=action[@n]")
        armed[name] = (action, int(count or 1))
    return armed


def _armings_of_environment() -> dict[str, _Arming]:
    armed = parse(os.environ.get(VARIABLE, ""))
    return {name: _Arming(action, count) for name, (action, count) in armed.items()}


_armings = _armings_of_environment()


def _hit(name: str, arming: _Arming) -> None:
    with _lock:
        arming.remaining -= 1
        if arming.remaining != 0 or not _first_time(name):
            return
    if arming.action == "kill":
        _kill()
    if arming.action == "hang":
        threading.Event().wait()
    code = getattr(errno, arming.action.removeprefix("error:"))
    raise OSError(code, f"{os.strerror(code)} (failpoint {name})")


def _first_time(name: str) -> bool:
    """Whether it has not fired in another process before; notes that it does now."""
    directory = os.environ.get(ONCE_VARIABLE)
    if not directory:
        return True
    try:
        (Path(directory) / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _kill() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")
