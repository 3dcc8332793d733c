"""``everstep vault prune``: a retention policy, applied to one run."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import typer

from everstep.cli import vault_tables as tables
from everstep.cli.options import Refused
from everstep.cli.vault_work import opened
from everstep.ledger import Ledger
from everstep.runtime import Settings
from everstep.runtime.checkpoints import Checkpoints, path_of
from everstep.vault import Manifest, Vault, VaultError
from everstep.vault.inspection import blob_damage
from everstep.vault.keys import blob_key
from everstep.vault.retention import Policy, metric_of, to_delete
from everstep.vault.room import readable
from everstep.wire.paths import parse_path


def prune(home: Path, run_id: str, policy: Policy, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Delete what a policy lets go, and print it.

    Args:
        home: the home; without ``dry_run`` no service may have it.
        run_id: whose checkpoints.
        policy: what to keep.
        dry_run: only print.
        yes: don't ask first.
        as_json: print JSON; then it is not asked either, so that needs ``yes``.

    Raises:
        Refused: there is no such run, or no one said yes.
    """
    asyncio.run(_prune(home, run_id, policy, dry_run, yes, as_json))


async def _prune(
    home: Path, run_id: str, policy: Policy, dry_run: bool, yes: bool, as_json: bool
) -> None:
    if as_json and not (yes or dry_run):
        raise Refused("--json asks no question: give --yes or --dry-run with it.")
    async with opened(home, read_only=dry_run) as ledger:
        vault = Vault(home / "vault", writer=False)
        manifests = await _manifests(ledger, vault, run_id)
        doomed = to_delete(
            manifests, policy, now=datetime.now(UTC), good=lambda m: _is_good(vault, m)
        )
        if as_json:
            tables.print_json(
                {
                    "dry_run": dry_run,
                    "deleted": [path_of(each.id) for each in doomed],
                    "kept": [path_of(each.id) for each in manifests if each not in doomed],
                }
            )
        else:
            _print(doomed, len(manifests) - len(doomed), policy)
        if dry_run or not doomed:
            return
        if not yes and not typer.confirm(f"Delete these {len(doomed)} checkpoints?"):
            raise Refused("Nothing was deleted.")
        checkpoints = Checkpoints(ledger, vault, Settings())
        for each in doomed:
            path = parse_path(str(path_of(each.id)))
            await checkpoints.delete(path.run_id, path.checkpoint_id)
    if not as_json:
        tables.console().print("Deleted. 'everstep vault gc' frees their files.")


async def _manifests(ledger: Ledger, vault: Vault, run_id: str) -> list[Manifest]:
    """The run's listed checkpoints, oldest first."""
    if await ledger.run(run_id) is None:
        raise Refused(f"There is no run {run_id}.")
    found = []
    for row in await ledger.checkpoints(run_id):
        try:
            found.append(vault.manifest(row.kind, row.run_id, row.name))
        except VaultError as error:
            tables.console().print(f"Passed over: {error}")
    return found


def _is_good(vault: Vault, manifest: Manifest) -> bool:
    keys = {blob_key(ref.blake3) for ref in manifest.files.values()}
    return all(blob_damage(vault.storage, key) is None for key in keys)


def _print(doomed: list[Manifest], kept: int, policy: Policy) -> None:
    rows = []
    for each in doomed:
        remark = f"{each.created_at:%Y-%m-%d %H:%M}  step {each.step}  {readable(each.size)}"
        if policy.metric is not None:
            value = metric_of(each, policy.metric)
            remark += f"  {policy.metric} {'none' if value is None else value}"
        rows.append((str(path_of(each.id)), remark))
    out = tables.console()
    if rows:
        out.print(tables.lines("To be deleted", rows))
    out.print(f"{len(doomed)} of {len(doomed) + kept} checkpoints go, {kept} stay.")
