"""Lists of runs and checkpoints, read through all pages."""

from __future__ import annotations

from everstep.cli.common.errors import NotFound, WrongUsage
from everstep.cli.common.filters import Filters
from everstep.client import RestClient
from everstep.client._transport.errors import NotFoundError
from everstep.client._transport.futures import APIFuture
from everstep.loops import catalog
from everstep.wire.messages.responses import Checkpoint, TrainingRun
from everstep.wire.paths import parse_path

_PAGE_SIZE = 100


def runs(rest: RestClient, filters: Filters, project_id: str | None = None) -> list[TrainingRun]:
    """List the runs that a filter admits, the latest used first."""
    found: dict[str, TrainingRun] = {}
    offset = 0
    while True:
        page = rest.list_training_runs(_PAGE_SIZE, offset, project_id=project_id).result()
        found.update((each.training_run_id, each) for each in page.training_runs)
        offset += len(page.training_runs)
        if not page.training_runs or offset >= page.cursor.total_count:
            return [each for each in found.values() if filters.admit_run(each)]


def checkpoints(rest: RestClient, filters: Filters) -> list[Checkpoint]:
    """List the checkpoints that a filter admits, newest first.

    Raises:
        NotFound: the filter names a run that does not exist.
    """
    if filters.run is None:
        listed = APIFuture.of(catalog.list_all(rest)).result()
    else:
        listed = of_run(rest, filters.run)
    found = [each for each in listed if filters.admit(each)]
    return sorted(found, key=lambda each: each.time, reverse=True)


def run(rest: RestClient, run_id: str) -> TrainingRun:
    """Return a run. Raises `NotFound`."""
    check_run(run_id)
    try:
        return rest.get_training_run(run_id).result()
    except NotFoundError as error:
        raise run_not_found(run_id) from error


def of_run(rest: RestClient, run_id: str) -> list[Checkpoint]:
    """List the checkpoints of a run. Raises `NotFound` if there is no such run."""
    check_run(run_id)
    try:
        return rest.list_checkpoints(run_id).result().checkpoints
    except NotFoundError as error:
        raise run_not_found(run_id) from error


def checkpoint(rest: RestClient, path: str) -> Checkpoint:
    """Return the checkpoint at a path.

    Raises:
        NotFound: there is no such checkpoint or run.
        InvalidPath: the path is malformed.
    """
    parsed = parse_path(path)
    found = [each for each in of_run(rest, parsed.run_id) if each.tinker_path == path]
    if not found:
        raise NotFound(
            f"There is no checkpoint {path}: it was never saved, was deleted, or has expired. "
            f"'everstep checkpoint list --run {parsed.run_id}' lists its checkpoints."
        )
    return found[0]


def check_run(run_id: str) -> None:
    """Raise `WrongUsage` for an empty id, as of an empty shell variable: it would mean all runs."""
    if not run_id.strip():
        raise WrongUsage("the run id is empty; 'everstep run list' lists the runs.")


def run_not_found(run_id: str) -> NotFound:
    """Build the error of a run that does not exist."""
    return NotFound(f"There is no run {run_id}. 'everstep run list' lists the runs.")
