"""Failpoints: named points in the code at which a test makes a process fail.

A module defines its failpoints at import time and calls them where a failure matters:

    _SYNCED = Failpoint("vault.write.synced", "a file's content is durable, its name is not there")
    ...
    _SYNCED()

They do nothing unless the environment arms them when the process starts, or `arm` does later:

    EVERSTEP_FAILPOINTS       name=action[@n], several separated by semicolons:
                              fire at the n-th call (default 1) of that name in this process
    EVERSTEP_FAILPOINTS_ONCE  a directory: a failpoint that fired leaves a file there and does not
                              fire again in any process

Actions: ``kill`` (SIGKILL to the process), ``abort`` (SIGABRT, as by a crash), ``hang`` (for ever),
``error:ENAME`` (raise OSError).
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
    """A named point of failure. Calling it only tests a flag unless it is armed.

    Args:
        name: ``package.subject.moment``.
        meaning: the state of the operation when a process fails here.
    """

    def __init__(self, name: str, meaning: str) -> None:
        if name in _registry:
            raise ValueError(f"there are two failpoints {name!r}")
        self.name = name
        self.meaning = meaning
        self._arming = _armings.get(name)
        _registry[name] = self

    def __call__(self) -> None:
        """Fail here if this failpoint is armed."""
        if self._arming is not None:
            _hit(self.name, self._arming)


_registry: dict[str, Failpoint] = {}
_lock = threading.Lock()


def registered() -> dict[str, str]:
    """Return the meanings of all failpoints in imported modules, by name."""
    return {name: point.meaning for name, point in sorted(_registry.items())}


def parse(text: str) -> dict[str, tuple[str, int]]:
    """Parse the variable's value into action and count by name.

    Raises:
        ValueError: a part has another form.
    """
    armed = {}
    for part in filter(None, (item.strip() for item in text.split(";"))):
        name, equals, rest = part.partition("=")
        action, _, count = rest.partition("@")
        known = action in ("kill", "abort", "hang") or (
            action.startswith("error:") and hasattr(errno, action.removeprefix("error:"))
        )
        if not name or not equals or not known or not (count or "1").isdecimal():
            raise ValueError(f"{VARIABLE}: {part!r} is not name=action[@n]")
        armed[name] = (action, int(count or 1))
    return armed


def arm(text: str) -> None:
    """Arm failpoints of this process, of modules that are imported and of those that will be.

    Args:
        text: the variable's value.

    Raises:
        ValueError: a part has another form.
    """
    for name, (action, count) in parse(text).items():
        _armings[name] = _Arming(action, count)
        if name in _registry:
            _registry[name]._arming = _armings[name]


_armings: dict[str, _Arming] = {}
arm(os.environ.get(VARIABLE, ""))


def rearm() -> None:
    """Read the environment again, in a process that was forked and given another environment.

    Raises:
        ValueError: a part of the variable has another form.
    """
    _armings.clear()
    for point in _registry.values():
        point._arming = None
    arm(os.environ.get(VARIABLE, ""))


def _hit(name: str, arming: _Arming) -> None:
    with _lock:
        arming.remaining -= 1
        if arming.remaining != 0 or not _first_time(name):
            return
    if arming.action == "kill":
        _kill()
    if arming.action == "abort":
        os.abort()
    if arming.action == "hang":
        threading.Event().wait()
    code = getattr(errno, arming.action.removeprefix("error:"))
    raise OSError(code, f"{os.strerror(code)} (failpoint {name})")


def _first_time(name: str) -> bool:
    """Return whether no process has fired it before, and record that it fires now."""
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
