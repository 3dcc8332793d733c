"""Deletion of sessions."""

from __future__ import annotations

from collections.abc import Sequence

from everstep.cli.common import deletion, names
from everstep.cli.common.target import Target

_SESSION = deletion.Deletable(
    noun="session",
    key="session_id",
    find=names.session_id,
    delete=lambda rest, key, dry_run: rest.delete_session(key, dry_run=dry_run).result(),
)


def delete_sessions(target: Target, sessions: Sequence[str], *, dry_run: bool, yes: bool) -> None:
    """Delete sessions after a confirmation, and print the outcomes. See `deletion.delete`."""
    deletion.delete(target, sessions, _SESSION, dry_run=dry_run, yes=yes)
