"""The process of an embedded service: when it is ready, how it ended, and what it logged."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

READY = "everstep: ready at "
_LOG_LINES = 15
_LOG_BYTES = 64 * 1024


def is_ready(process: subprocess.Popen[bytes]) -> bool:
    """Wait until a service reports that it is ready. Returns False if it ends before."""
    if process.stdout is None:
        return False
    with process.stdout as output:
        return any(line.decode(errors="replace").startswith(READY) for line in output)


def log_tail(path: Path, begin: int) -> str:
    """Return the last lines of a log."""
    with path.open("rb") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(begin, size - _LOG_BYTES))
        return "\n".join(log.read().decode(errors="replace").splitlines()[-_LOG_LINES:])


def exit_reason(code: int) -> str:
    """Describe how a process ended."""
    if code < 0:
        return f"was killed by signal {-code} ({signal.strsignal(-code)})"
    return f"exited with code {code}"
