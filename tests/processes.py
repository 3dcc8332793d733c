"""The processes of a service: its workers and its zygote, found by the home in their arguments."""

from __future__ import annotations

from pathlib import Path


def processes_of(home: Path) -> dict[int, bytes]:
    """Arguments by process id of the processes that name a home in JSON: workers and zygotes."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes()
        except OSError:
            continue  # it ended
        if f'"{home}"'.encode() in arguments:
            found[int(process.name)] = arguments
    return found


def worker_of(home: Path) -> int | None:
    """The process id of a home's worker; None while there is none."""
    running = (pid for pid, each in processes_of(home).items() if b"everstep.worker.main" in each)
    return next(running, None)


def zygote_of(home: Path) -> int | None:
    """The process id of the zygote that a home's service owns; None while there is none."""
    running = (pid for pid, each in processes_of(home).items() if b"everstep.worker.zygote" in each)
    return next(running, None)
