"""Stopping a home's service in an orderly way."""

from __future__ import annotations

from pathlib import Path
from time import monotonic, sleep

from everstep import service_home
from everstep.cli.common.errors import Refused
from everstep.cli.common.output import confirm, counted
from everstep.cli.common.progress_bars import waiting
from everstep.cli.serve.process import ServiceProcess, clients_of
from everstep.service_home import ServiceRecord

_POLL_SECONDS = 0.05


def stop_service(home: Path, timeout: float, yes: bool) -> None:
    """Stop the service that runs on a home, and wait for its end.

    Args:
        home: the home.
        timeout: how long to wait, in seconds.
        yes: don't ask before an embedded service is stopped under its clients.

    Raises:
        Refused: the user declined, the service has not ended in time, or it is not known which
            process it is.
        PermissionError: it is another user's process.
    """
    home = home.expanduser().resolve()
    deadline = monotonic() + timeout
    record = _find(home, deadline)
    if record is None:
        print(f"No service runs on {home}.")
        return
    try:
        with ServiceProcess(home, record) as process:
            if record.embedded and not yes:
                _ask(home, record)
                deadline = monotonic() + timeout
            process.terminate()
            with waiting(f"the service on {home} saves its runs and stops"):
                ended = process.wait(max(0.0, deadline - monotonic()))
    except ProcessLookupError as error:
        left = service_home.living(home)
        ended = left is None or left.process != record.process  # in between, by itself
        if not ended:
            raise Refused(
                f"{home}/service.json names process {record.process}, which is not the service "
                "that runs there. Nothing was stopped. Find it with 'ps', and stop it with SIGTERM."
            ) from error
    if not ended:
        raise Refused(
            f"the service on {home} (process {record.process}) was asked to stop and has not ended "
            f"after {timeout:g} s. Wait for it: repeat the command, or see 'everstep serve "
            f"status'. If it hangs: kill -9 {record.process}. Acknowledged work is kept, and the "
            "next start resumes it."
        )
    print(f"The service on {home} (process {record.process}) has ended.")


def _find(home: Path, deadline: float) -> ServiceRecord | None:
    """Return the service that runs on a home, or None. One that starts may not be known yet."""
    with waiting(f"waiting for the service on {home}"):
        while True:
            record = service_home.living(home)
            if record is not None and record.process:
                return record
            held = service_home.is_held(service_home.run_lock_path(home))
            if not (held or service_home.is_starting(home)):
                return None
            if monotonic() > deadline:
                break
            sleep(_POLL_SECONDS)
    raise Refused(
        f"a service on {home} starts or stops, and has not said which process it is. Try again."
    )


def _ask(home: Path, record: ServiceRecord) -> None:
    """Ask before an embedded service is stopped under its clients."""
    clients = clients_of(home, record.process)
    if not clients:
        return
    names = "; ".join(f"process {each.process}: {each.command}" for each in clients)
    confirm(
        f"The service on {home} is embedded: it ends with its clients. "
        f"{counted(len(clients), 'process')} would lose it ({names}). Stop it?",
        f"Nothing was stopped. The service on {home} is used by {names}.",
    )
