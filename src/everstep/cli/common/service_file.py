"""The service that runs on a home, as commands find it."""

from __future__ import annotations

import os
from pathlib import Path

from everstep import service_home
from everstep.cli.common.errors import Refused

_PROBE_SECONDS = 5.0


def find_address(home: Path) -> str | None:
    """Return the address of a home's service, or None if none runs there."""
    found = service_home.running(home)
    return None if found is None else found.address


def require_unlocked(home: Path) -> None:
    """Check that a service can be started on a home on which none runs.

    Raises:
        Refused: another process has the ledger open: a command that works without a service.
    """
    from everstep.ledger.sqlite.database import wait_unlocked

    if is_used(home) or wait_unlocked(home / "ledger.sqlite.lock", _PROBE_SECONDS):
        return
    raise Refused(
        f"{home} is in use by another everstep command, and no service answers there. Try again "
        "when it is done, or stop it."
    )


def can_attach(home: Path) -> bool:
    """Return whether a service that is ready runs on a home, and this user may attach to it.

    A client holds a lock in the home. A home that is mounted read-only is read beside its service,
    and so is one whose service starts or stops.
    """
    found = service_home.running(home)
    return found is not None and not found.stopping and os.access(home, os.W_OK)


def is_used(home: Path) -> bool:
    """Return whether a service runs on a home, starts or stops. A client waits for it."""
    names = ("service.run.lock", "service.start.lock")
    return any(service_home.is_held(home / name) for name in names)
