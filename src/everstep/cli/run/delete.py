"""Deletion of runs."""

from __future__ import annotations

from collections.abc import Sequence

from everstep.cli.common import deletion, names
from everstep.cli.common.target import Target

_RUN = deletion.Deletable(
    noun="run",
    key="training_run_id",
    find=names.run_id,
    delete=lambda rest, key, dry_run: rest.delete_training_run(key, dry_run=dry_run).result(),
)


def delete_runs(target: Target, runs: Sequence[str], *, dry_run: bool, yes: bool) -> None:
    """Delete runs after a confirmation, and print the outcomes. See `deletion.delete`."""
    deletion.delete(target, runs, _RUN, dry_run=dry_run, yes=yes)
