"""Pruning: a retention policy, applied to one run after a confirmation."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Literal

from everstep.cli.checkpoint.delete import delete_paths
from everstep.cli.common import output
from everstep.cli.common.errors import NotFound, Refused, WrongUsage
from everstep.cli.common.target import Target
from everstep.cli.vault import tables
from everstep.client._transport.errors import NotFoundError
from everstep.vault.retention import Policy
from everstep.wire.messages.maintenance import PrunedCheckpoint, PruneRequest, PruneResponse

_TIMEOUT = 3600.0


def prune_request(
    run_id: str,
    keep_last: int,
    keep_best: int,
    metric: str | None,
    mode: Literal["min", "max"],
    ttl: float | None,
) -> PruneRequest:
    """Build the request for a plan.

    Args:
        run_id: run of the checkpoints.
        keep_last: number of newest checkpoints to keep.
        keep_best: number of best checkpoints to keep.
        metric: entry of user_metadata that ranks the checkpoints.
        mode: whether the smallest or the largest is best.
        ttl: age, in seconds, below which checkpoints are kept.

    Raises:
        WrongUsage: the policy keeps nothing, or has no metric to find the best by.
    """
    try:
        Policy(keep_last, keep_best, metric, mode, None if ttl is None else timedelta(seconds=ttl))
    except ValueError as error:
        raise WrongUsage(str(error)) from error
    return PruneRequest(
        run_id=run_id,
        keep_last=keep_last,
        keep_best=keep_best,
        metric=metric,
        mode=mode,
        ttl_seconds=ttl,
        dry_run=True,
    )


def prune_run(
    home: Path,
    vault_url: str | None,
    request: PruneRequest,
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Delete the checkpoints that a policy does not keep, and print them.

    The service plans. Exactly the checkpoints that were printed and confirmed are deleted.

    Args:
        home: the home.
        vault_url: the bucket in which its vault is expected.
        request: run and policy.
        dry_run: only print.
        yes: skip the confirmation.
        as_json: print JSON.

    Raises:
        WrongUsage: JSON is wanted, which allows no question, without ``yes`` or ``dry_run``.
        NotFound: there is no such run.
        Refused: the answer was no, or a checkpoint could not be deleted.
    """
    if as_json and not (yes or dry_run):
        raise WrongUsage("--json asks no questions: give --yes or --dry-run with it.")
    target = Target.of_home(home, vault_url, as_json)
    with target.service() as service:
        service.require_everstep("pruning")
        try:
            plan = service.call("/everstep/vault/prune", request, PruneResponse, timeout=_TIMEOUT)
        except NotFoundError as error:
            raise NotFound(
                f"There is no run {request.run_id}. 'everstep run list' lists the runs."
            ) from error
        paths = [each.tinker_path for each in plan.deleted]
        if not as_json:
            _print(plan, request.metric)
        deletes = bool(paths) and not dry_run
        if deletes and not yes:
            count = output.counted(len(paths), "checkpoint")
            output.confirm(f"Delete {count}?", "Nothing was deleted.")
        done = delete_paths(service, paths) if deletes else []
    failed = [f"{each.tinker_path}: {each.error}" for each in done if each.error]
    if failed:
        raise Refused("Some checkpoints were not deleted: " + "; ".join(failed))
    if as_json:
        kept = [each.tinker_path for each in plan.kept]
        skipped = plan.passed_over
        output.print_json({"dry_run": dry_run, "deleted": paths, "kept": kept, "skipped": skipped})
    elif deletes:
        output.console().print("Deleted. 'everstep vault gc' frees their files.")


def _print(plan: PruneResponse, metric: str | None) -> None:
    for text in plan.passed_over:
        output.console().print(f"Skipped: {text}")
    if plan.deleted:
        rows = [(each.tinker_path, _remark(each, metric)) for each in plan.deleted]
        tables.print_remarks("To be deleted", rows)
    deleted, kept = len(plan.deleted), len(plan.kept)
    count = output.counted(deleted + kept, "checkpoint")
    output.console().print(f"{deleted} of {count} to be deleted, {kept} to be kept.")


def _remark(checkpoint: PrunedCheckpoint, metric: str | None) -> str:
    size = output.size_text(checkpoint.size_bytes)
    remark = f"{output.time_text(checkpoint.time)}  step {checkpoint.step}  {size}"
    if metric is None:
        return remark
    return f"{remark}  {metric} {'none' if checkpoint.metric is None else checkpoint.metric}"
