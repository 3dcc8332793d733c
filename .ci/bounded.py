"""Bounded run: runs a command for a limited time, and kills every process that it leaves behind.

    python3 .ci/bounded.py SECONDS COMMAND…

Processes that outlive their parents are reparented to this one, whatever session they are in. When
the command ends they are listed and killed, so none can hold a pipe open that somebody reads to its
end. When the time is up every process gets SIGABRT first: Python with a fault handler, as pytest
installs one, prints the stack of every thread.
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
_TIMED_OUT = 124
_STACK_SECONDS = 3.0
_KILL_SECONDS = 30.0


def main(seconds: float, command: list[str]) -> int:
    """Run the command; returns its exit code, or 124 if it took too long."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        child = os.spawnvp(os.P_NOWAIT, command[0], command)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        code = _wait_for(child)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _report("left behind, killed", _descendants())
    except TimeoutError:
        _report(f"not finished after {seconds / 60:g} minutes, killed", _descendants())
        _signal(signal.SIGABRT)
        time.sleep(_STACK_SECONDS)
        code = _TIMED_OUT
    except KeyboardInterrupt:
        code = 128 + signal.SIGTERM
    finally:
        _end_all()
    return code


def _interrupt(number: int, _frame: object) -> None:
    raise TimeoutError if number == signal.SIGALRM else KeyboardInterrupt


def _wait_for(child: int) -> int:
    """Wait until a child ends, and reap reparented processes meanwhile."""
    while True:
        pid, status = os.wait()
        if pid == child:
            return os.waitstatus_to_exitcode(status) % 256


def _end_all() -> None:
    """Kill and reap until no process is left, for a bounded time: the kernel may hold some."""
    until = time.monotonic() + _KILL_SECONDS
    while time.monotonic() < until:
        _signal(signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.05)
    _report("can't be killed", _descendants())


def _signal(number: int) -> None:
    for pid in _descendants():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _descendants() -> dict[int, str]:
    """Return the command lines of all living descendants of this process."""
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


def _report(event: str, processes: dict[int, str]) -> None:
    for pid, command in processes.items():
        print(f"==> {event}: {pid} {command[:200]}", flush=True)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
