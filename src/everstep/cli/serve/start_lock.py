"""The start of a service: one at a time on a home, and only if none runs there."""

from __future__ import annotations

from pathlib import Path

from everstep import service_home
from everstep.cli.common.errors import Refused
from everstep.cli.serve.options import command_on
from everstep.service_home import Lock


def open_start_lock(home: Path, handed_over: int | None = None) -> Lock:
    """Open a home's start lock. The home is created if needed.

    Args:
        home: the home.
        handed_over: the lock's file, from the process that started this one and holds the lock.

    Raises:
        Refused: the home can't be used.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        return service_home.start_lock(home, handed_over)
    except OSError as error:
        raise Refused(
            f"{home} can't be used as a home: {error}. Choose another by --home or EVERSTEP_HOME."
        ) from error


def wait_for(starting: Lock, home: Path) -> None:
    """Hold a home's start lock, once no other service starts there."""
    if starting.hold(wait=False):
        return
    from everstep.cli.common.progress_bars import waiting

    with waiting(f"waiting for another service that starts on {home}"):
        starting.hold()


def require_unused(home: Path) -> None:
    """Check that no service runs on a home, once one that stops has ended.

    The caller holds the start lock.

    Raises:
        Refused: one does. The text says which, and how to use or stop it.
    """
    found = service_home.running(home)
    if found is not None and found.stopping:
        from everstep.cli.common.progress_bars import waiting

        with waiting(f"waiting for the service on {home} to stop"):
            found = service_home.running_on(home)
    if found is None:
        return
    raise Refused(
        f"a service runs on {home} already: {found.describe()}. Clients attach to it: "
        f"ServiceClient() with EVERSTEP_HOME={home}, or TINKER_BASE_URL={found.address}. "
        "Commands do so with --home. To run another one, stop it "
        f"({command_on(home, 'everstep serve stop')}), or choose another --home."
    )
