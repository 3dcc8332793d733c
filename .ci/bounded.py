"""Run a command to its end, or to the end of its time; whatever it started ends with it.

    python3 .ci/bounded.py SECONDS COMMAND…

Processes that outlive their parents are handed to this one, whatever session they are in; when the
command is through they are named and killed. So nothing is left that could hold a pipe open which
someone reads to its end. When the time is up each process is first asked where it is: Python with
a fault handler, as pytest has it, prints the stack of every thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_TOO_LATE = 124
_SECONDS_FOR_STACKS = 3.0
_SECONDS_TO_DIE = 30.0


def main(seconds: float, command: list[str]) -> int:
    """Run it; returns its exit code, 124 when it took too long."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        child = os.spawnvp(os.P_NOWAIT, command[0], command)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        code = _wait_for(child)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _tell("left behind, and ended now", _descendants())
    except TimeoutError:
        _tell(f"not through after {seconds / 60:g} minutes, and given up", _descendants())
        _signal(signal.SIGABRT)
        time.sleep(_SECONDS_FOR_STACKS)
        code = _TOO_LATE
    except KeyboardInterrupt:
        code = 128 + signal.SIGTERM
    finally:
        _end_all()
    return code


def _interrupt(number: int, _frame: object) -> None:
    raise TimeoutError if number == signal.SIGALRM else KeyboardInterrupt


def _wait_for(child: int) -> int:
    """Until a child ends; those that were handed to us are reaped on the way."""
    while True:
        pid, status = os.wait()
        if pid == child:
            return os.waitstatus_to_exitcode(status) % 256


def _end_all() -> None:
    """Kill and reap until there is nothing left, but for what the kernel itself holds."""
    until = time.monotonic() + _SECONDS_TO_DIE
    while time.monotonic() < until:
        _signal(signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.05)
    _tell("can't be ended", _descendants())


def _signal(number: int) -> None:
    for pid in _descendants():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _descendants() -> dict[int, str]:
    """The command lines of all living processes below this one."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, *_ = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended
        if state not in "ZX":
            children.setdefault(int(parent), []).append(int(entry.parent.name))
    found: list[int] = []
    level = [os.getpid()]
    while level:
        level = [child for pid in level for child in children.get(pid, [])]
        found += level
    return {pid: _command_line(pid) for pid in found}


def _command_line(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return b" ".join(words).decode(errors="replace")


def _tell(what: str, processes: dict[int, str]) -> None:
    for pid, command in processes.items():
        print(f"==> {what}: {pid} {command[:200]}", flush=True)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
