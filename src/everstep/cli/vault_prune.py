"""``everstep vault prune``: a retention policy, applied to one run."""

from __future__ import annotations

import asyncio
from pathlib import Path

import typer

from everstep.cli import output, running
from everstep.cli import vault_tables as tables
from everstep.cli.errors import Refused
from everstep.cli.vault_work import opened
from everstep.ledger import LedgerLocked
from everstep.runtime import Settings, pruning
from everstep.runtime.checkpoints import Checkpoints, path_of
from everstep.runtime.pruning import Pruning
from everstep.vault import Manifest, open_vault
from everstep.vault.retention import Policy, metric_of
from everstep.vault.room import readable
from everstep.wire.publication import DeleteCheckpointsResponse

_AT_ONCE = 1000


def prune(home: Path, run_id: str, policy: Policy, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Delete what a policy lets go, and print it.

    Args:
        home: the home; a service that has it deletes them itself.
        run_id: whose checkpoints.
        policy: what to keep.
        dry_run: only print.
        yes: don't ask first.
        as_json: print JSON; then it is not asked either, so that needs ``yes``.

    Raises:
        Refused: there is no such run, or no one said yes.
    """
    if as_json and not (yes or dry_run):
        raise Refused("--json asks no question: give --yes or --dry-run with it.")
    try:
        doomed = asyncio.run(_prune(home, run_id, policy, dry_run, yes, as_json))
    except LedgerLocked:
        doomed = asyncio.run(_plan_beside(home, run_id, policy, yes, as_json))
    if doomed and not dry_run and not as_json:
        output.console().print("Deleted. 'everstep vault gc' frees their files.")


async def _prune(
    home: Path, run_id: str, policy: Policy, dry_run: bool, yes: bool, as_json: bool
) -> list[Manifest]:
    """Delete them oneself; returns which."""
    async with opened(home, read_only=dry_run) as ledger:
        vault = open_vault(home, writer=False)
        found = await pruning.plan(ledger, vault, run_id, policy)
        _show(found, policy, dry_run, as_json)
        if not dry_run and _agreed(found, yes):
            await pruning.delete(Checkpoints(ledger, vault, Settings()), found.doomed)
        return found.doomed


async def _plan_beside(
    home: Path, run_id: str, policy: Policy, yes: bool, as_json: bool
) -> list[Manifest]:
    """Have the service delete them; returns which."""
    async with opened(home, read_only=True) as ledger:
        found = await pruning.plan(ledger, open_vault(home, writer=False), run_id, policy)
    _show(found, policy, False, as_json)
    if _agreed(found, yes):
        paths = [str(path_of(each.id)) for each in found.doomed]
        for start in range(0, len(paths), _AT_ONCE):
            body = {"tinker_paths": paths[start : start + _AT_ONCE]}
            answer = running.ask(home, "everstep/checkpoints/delete", body)
            results = DeleteCheckpointsResponse.model_validate(answer).results
            failed = [f"{each.tinker_path}: {each.error}" for each in results if each.error]
            if failed:
                raise Refused("Not all were deleted: " + "; ".join(failed))
    return found.doomed


def _agreed(found: Pruning, yes: bool) -> bool:
    """Whether there is something to delete; raises `Refused` unless that is agreed to."""
    count = len(found.doomed)
    if count and not yes and not typer.confirm(f"Delete these {count} checkpoints?"):
        raise Refused("Nothing was deleted.")
    return bool(count)


def _show(found: Pruning, policy: Policy, dry_run: bool, as_json: bool) -> None:
    if as_json:
        output.print_json(
            {
                "dry_run": dry_run,
                "deleted": [path_of(each.id) for each in found.doomed],
                "kept": [path_of(each.id) for each in found.kept],
            }
        )
        return
    for text in found.passed_over:
        output.console().print(f"Passed over: {text}")
    _print(found.doomed, len(found.kept), policy)


def _print(doomed: list[Manifest], kept: int, policy: Policy) -> None:
    rows = []
    for each in doomed:
        remark = f"{each.created_at:%Y-%m-%d %H:%M}  step {each.step}  {readable(each.size)}"
        if policy.metric is not None:
            value = metric_of(each, policy.metric)
            remark += f"  {policy.metric} {'none' if value is None else value}"
        rows.append((str(path_of(each.id)), remark))
    out = output.console()
    if rows:
        out.print(tables.lines("To be deleted", rows))
    out.print(f"{len(doomed)} of {len(doomed) + kept} checkpoints go, {kept} stay.")
