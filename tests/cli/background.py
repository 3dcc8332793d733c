"""Commands that manage a service in the background, and its process, which is no child of ours."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from everstep import service_home

SERVE = [sys.executable, "-P", "-m", "everstep", "serve"]
PATIENCE = 120.0


def environment() -> dict[str, str]:
    """Return the environment of commands: their services use the tests' zygote."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def start_command(home: Path, *words: str, **options: Any) -> subprocess.Popen[str]:
    """Start ``everstep serve WORDS --home HOME``, with options of `subprocess.Popen`."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [*SERVE, *words, "--home", str(home)]
    return subprocess.Popen(command, text=True, env=environment(), **pipes | options)


def call(home: Path, *words: str) -> tuple[int, str, str]:
    """Run a command. Returns its exit code, and what it printed to both outputs."""
    with start_command(home, *words) as process:
        out, messages = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in messages
    return process.returncode, out, messages


def status(home: Path) -> dict[str, Any]:
    """Return what ``everstep serve status --json`` prints."""
    _, out, _ = call(home, "status", "--json")
    content = json.loads(out)
    assert isinstance(content, dict)
    return content


def kill(home: Path) -> int:
    """SIGKILL the service of a home, and wait for its end. Returns its process id."""
    record = service_home.living(home)
    assert record is not None
    with contextlib.ExitStack() as stack:
        handle = os.pidfd_open(record.process)
        stack.callback(os.close, handle)
        os.kill(record.process, signal.SIGKILL)
        assert select.select([handle], [], [], PATIENCE)[0]
    return record.process


def clean_up(home: Path) -> None:
    """Kill the service of a home, if one runs."""
    if service_home.living(home) is not None:
        kill(home)
