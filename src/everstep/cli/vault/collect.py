"""Garbage collection of a service's vault, on request."""

from __future__ import annotations

from everstep.cli.common import output
from everstep.cli.common.target import Target
from everstep.cli.vault import tables
from everstep.wire.messages.maintenance import CollectRequest, CollectResponse

_TIMEOUT = 3600.0
_BUSY = 503


def collect(target: Target, grace: float, dry_run: bool) -> None:
    """Remove expired checkpoints and unreferenced files, and print them.

    Args:
        target: the service.
        grace: minimum age, in seconds, of removed files.
        dry_run: only print.

    Raises:
        NotOffered: the service is not Everstep.
        InternalServerError: a backup is being made.
    """
    request = CollectRequest(grace_seconds=grace, dry_run=dry_run)
    with target.service() as service:
        service.require_everstep("garbage collection")
        done = service.call(
            "/everstep/vault/collect",
            request,
            CollectResponse,
            timeout=_TIMEOUT,
            not_retried=(_BUSY,),
        )
    if target.as_json:
        output.print_json(done.model_dump())
    else:
        _print(done)


def _print(done: CollectResponse) -> None:
    rows = [(path, "of a session that ended") for path in done.ended]
    rows += [(path, "expired") for path in done.expired]
    rows += [(path, "not in the database") for path in done.orphaned]
    rows += [(digest, "unreferenced") for digest in done.files] if done.dry_run else []
    if rows:
        tables.print_remarks("To be removed" if done.dry_run else "Removed", rows)
    checkpoints = len(done.ended) + len(done.expired) + len(done.orphaned)
    verb = "would be removed" if done.dry_run else "removed"
    output.console().print(
        f"{output.counted(checkpoints, 'checkpoint')} and {output.counted(len(done.files), 'file')}"
        f" {verb}: {output.size_text(done.bytes)}."
    )
