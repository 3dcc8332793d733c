"""``everstep vault prune``: a retention policy, applied to one run."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from everstep.cli import output, running
from everstep.cli import vault_tables as tables
from everstep.cli.errors import NotFound, Refused, WrongUsage
from everstep.cli.vault_work import opened
from everstep.ledger import Ledger, LedgerLocked
from everstep.runtime import Settings, pruning
from everstep.runtime.checkpoints import Checkpoints, path_of
from everstep.runtime.errors import Rejected
from everstep.runtime.pruning import Pruning
from everstep.vault import Manifest, Vault, open_vault
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
        WrongUsage: it can't be asked, and nobody said yes.
        NotFound: there is no such run.
        Refused: the answer was no.
    """
    if as_json and not (yes or dry_run):
        raise WrongUsage("--json asks no question: give --yes or --dry-run with it.")
    agreed = _Agreement(policy, dry_run, yes, as_json)
    try:
        found = asyncio.run(_prune(home, run_id, policy, agreed))
    except LedgerLocked:
        found = asyncio.run(_prune_beside(home, run_id, policy, agreed))
    if as_json:
        output.print_json(
            {
                "dry_run": dry_run,
                "deleted": [path_of(each.id) for each in found.doomed],
                "kept": [path_of(each.id) for each in found.kept],
            }
        )
    elif found.doomed and not dry_run:
        output.console().print("Deleted. 'everstep vault gc' frees their files.")


@dataclass(frozen=True)
class _Agreement:
    """How it is made sure that somebody wants it; see `prune`."""

    policy: Policy
    dry_run: bool
    yes: bool
    as_json: bool

    def to(self, found: Pruning) -> bool:
        """Whether something is to be deleted now; raises `Refused` when the answer is no."""
        if not self.as_json:
            for text in found.passed_over:
                output.console().print(f"Passed over: {text}")
            _print(found.doomed, len(found.kept), self.policy)
        if self.dry_run or not found.doomed:
            return False
        if not self.yes:
            count = output.counted(len(found.doomed), "checkpoint")
            output.agree(f"Delete {count}?", "Nothing was deleted.")
        return True


async def _prune(home: Path, run_id: str, policy: Policy, agreed: _Agreement) -> Pruning:
    """Delete them oneself."""
    async with opened(home, read_only=agreed.dry_run) as ledger:
        vault = open_vault(home, writer=False)
        found = await _plan(ledger, vault, run_id, policy)
        if agreed.to(found):
            await pruning.delete(Checkpoints(ledger, vault, Settings()), found.doomed)
        return found


async def _prune_beside(home: Path, run_id: str, policy: Policy, agreed: _Agreement) -> Pruning:
    """Have the service delete them."""
    async with opened(home, read_only=True) as ledger:
        found = await _plan(ledger, open_vault(home, writer=False), run_id, policy)
    if not agreed.to(found):
        return found
    paths = [str(path_of(each.id)) for each in found.doomed]
    for start in range(0, len(paths), _AT_ONCE):
        body = {"tinker_paths": paths[start : start + _AT_ONCE]}
        answer = running.ask(home, "everstep/checkpoints/delete", body)
        results = DeleteCheckpointsResponse.model_validate(answer).results
        failed = [f"{each.tinker_path}: {each.error}" for each in results if each.error]
        if failed:
            raise Refused("Not all were deleted: " + "; ".join(failed))
    return found


async def _plan(ledger: Ledger, vault: Vault, run_id: str, policy: Policy) -> Pruning:
    try:
        return await pruning.plan(ledger, vault, run_id, policy)
    except Rejected as error:
        raise NotFound(f"{error} 'everstep run list' lists those that are there.") from error


def _print(doomed: list[Manifest], kept: int, policy: Policy) -> None:
    rows = []
    for each in doomed:
        remark = f"{output.time_text(each.created_at)}  step {each.step}  {readable(each.size)}"
        if policy.metric is not None:
            value = metric_of(each, policy.metric)
            remark += f"  {policy.metric} {'none' if value is None else value}"
        rows.append((str(path_of(each.id)), remark))
    if rows:
        tables.print_remarks("To be deleted", rows)
    count = output.counted(len(doomed) + kept, "checkpoint")
    output.console().print(f"{len(doomed)} of {count} go, {kept} stay.")
