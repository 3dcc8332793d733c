"""Training runs, listed or one by one."""

from __future__ import annotations

from typing import Any

from everstep.cli.checkpoint import tables
from everstep.cli.common import filters, listing, names, output
from everstep.cli.common.target import Target
from everstep.wire.messages.inspection import EnvironmentChange


def print_runs(target: Target, wanted: filters.Filters, project: str | None, limit: int) -> None:
    """Print the runs that match, the latest used first.

    Args:
        target: the service.
        wanted: filters of runs.
        project: only runs of this project.
        limit: maximum number of rows, or 0 for all.
    """
    with target.reader() as service:
        found = listing.runs(service.rest, wanted, project)
    shown = found[: limit or None]
    if target.as_json:
        output.print_json(
            {"runs": [each.model_dump(mode="json") for each in shown], "total": len(found)}
        )
        return
    rows = [
        (
            output.ago_text(each.last_request_time),
            each.base_model,
            "" if each.lora_rank is None else str(each.lora_rank),
            filters.run_name(each),
            "corrupted" if each.corrupted else "",
            each.training_run_id,
        )
        for each in shown
    ]
    output.print_listing(
        ("used", "base model", "rank", "name", "state", "run"), rows, len(found), "run"
    )


def print_run(target: Target, run_id: str) -> None:
    """Print one run and its checkpoints. Raises `NotFound`."""
    with target.reader() as service:
        run_id = names.run_id(service.rest, run_id)
        run = listing.run(service.rest, run_id)
        saved = listing.checkpoints(service.rest, filters.Filters(run=run_id))
    if target.as_json:
        content: dict[str, Any] = run.model_dump(mode="json")
        output.print_json(
            {**content, "checkpoints": [each.model_dump(mode="json") for each in saved]}
        )
        return
    output.print_facts(
        [
            ("run", run.training_run_id),
            ("name", filters.run_name(run) or None),
            ("base model", run.base_model),
            ("rank", None if run.lora_rank is None else str(run.lora_rank)),
            ("owner", run.model_owner),
            ("last used", output.when_text(run.last_request_time)),
            ("state", "corrupted: it accepts no operations" if run.corrupted else None),
            *(("moved", _move_text(change)) for change in run.environment_changes or []),
            *((f"· {k}", v) for k, v in output.own_metadata(run.user_metadata).items()),
        ]
    )
    output.console().print()
    tables.print_list(saved, len(saved))


def _move_text(change: EnvironmentChange) -> str:
    """Describe a change of the numeric environment."""
    changed = "; ".join(f"{name} {how}" for name, how in change.changed.items())
    return (
        f"{output.when_text(change.at)}, after operation {change.seq_id}: {changed}. "
        "Results up to there are continued to a tolerance, not bit for bit."
    )
