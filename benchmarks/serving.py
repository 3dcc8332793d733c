"""A service of its own for a benchmark, and what its processes use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
EVERSTEP = (sys.executable, "-m", "everstep.cli")


@dataclass(frozen=True)
class Served:
    """A running service.

    Attributes:
        address: its URL.
        process: its process id. The worker is one of its descendants.
    """

    address: str
    process: int

    def cpu_seconds(self) -> float:
        """Return the CPU time that the service has used, without its worker's."""
        fields = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def kill_worker(self) -> bool:
        """Kill the worker. Returns whether there was one."""
        processes = [self.process]
        while processes:  # the service's children, and theirs
            process = Path(f"/proc/{processes.pop()}")
            if b"everstep.worker.main" in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
                return True
            children = (process / "task" / process.name / "children").read_text()
            processes += map(int, children.split())
        return False


@contextmanager
def serving(
    home: Path,
    *settings: str,
    models: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
    everstep: Sequence[str] = EVERSTEP,
) -> Iterator[Served]:
    """Start a service on a home, and stop it at the end of the block.

    Args:
        home: its home directory.
        settings: ``name=value`` of each setting.
        models: ``NAME=PATH`` of each model. If empty, it serves the built-in one.
        environment: further environment variables.
        everstep: the command that it is a ``serve`` of.
    """
    command = [*everstep, "serve", "--home", str(home), "--port", "0"]
    for setting in settings:
        command += ["--set", setting]
    for model in models:
        command += ["--model", model]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **(environment or {})},
    ) as process:
        assert process.stdout is not None
        ready = next((line for line in process.stdout if "ready at" in line), None)
        if ready is None:
            raise RuntimeError("the service did not start")
        try:
            yield Served(ready.split()[-1], process.pid)
        finally:
            process.terminate()
