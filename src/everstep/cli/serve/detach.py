"""The service in the background: a session of its own, which outlives the terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from everstep import service_home
from everstep.cli.common.errors import Refused, WrongUsage
from everstep.cli.common.output import messages, one_line
from everstep.cli.common.progress_bars import waiting
from everstep.cli.serve.options import ServeOptions, command_on
from everstep.cli.serve.start_lock import open_start_lock, require_unused, wait_for
from everstep.client._transport.service_process import exit_reason, log_tail
from everstep.service_home import ServiceRecord

_POLL_SECONDS = 0.05
_USAGE = 2


def start_detached(options: ServeOptions) -> None:
    """Start the service in the background, wait until it is ready, and say where it is.

    Args:
        options: what to serve, and where.

    Raises:
        Refused: the home can't be used, a service runs on it, or this one did not become ready. The
            text has the reason, or the last lines of its log.
    """
    home = options.home.expanduser().resolve()
    with open_start_lock(home) as starting:
        wait_for(starting, home)
        require_unused(home)
        command = [sys.executable, "-P", "-m", "everstep.cli", "serve", *options.arguments()]
        command.append(f"--start-lock={starting.handle}")
        path = service_home.begin_log(home)
        with path.open("ab") as log:
            begin = log.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=() if starting.handle is None else (starting.handle,),
            )
        found = _await_ready(process, home, path, begin)
    print(f"everstep: ready at {found.address} (process {found.process}, in the background)")
    print(f"  stop it: {command_on(home, 'everstep serve stop')}")
    print(f"  its log: {command_on(home, 'everstep serve logs')}")


def _await_ready(
    process: subprocess.Popen[bytes], home: Path, log: Path, begin: int
) -> ServiceRecord:
    """Wait until a service is ready. It holds the start lock as well: it goes on without us."""
    try:
        with waiting(f"starting a service on {home}") as show:
            while (code := _ended(process)) is None:
                found = service_home.running(home)
                if found is not None and found.process == process.pid:
                    return found
                show(one_line(log_tail(log, begin).rpartition("\n")[2]))
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        messages().print("everstep: the start was interrupted; no service runs")
        raise
    kind = WrongUsage if code == _USAGE else Refused
    raise kind(
        f"the service {exit_reason(code)} before it became ready. Last lines of {log}:\n"
        + log_tail(log, begin)
    )


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    """Wait a moment for the end of a process. Returns its exit code, or None if it goes on."""
    try:
        return process.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return None
