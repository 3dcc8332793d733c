"""Everything of a kind that a service lists, through its pages."""

from __future__ import annotations

from everstep.cli.errors import NotFound, WrongUsage
from everstep.cli.filters import Filters
from everstep.client import RestClient
from everstep.client import _catalogue as catalogue
from everstep.client._errors import NotFoundError
from everstep.client._futures import APIFuture
from everstep.wire.paths import parse_path
from everstep.wire.responses import Checkpoint, TrainingRun

_RUNS_AT_ONCE = 100


def runs(rest: RestClient, filters: Filters, project_id: str | None = None) -> list[TrainingRun]:
    """All runs that a filter admits, the latest used first."""
    found: dict[str, TrainingRun] = {}
    offset = 0
    while True:
        page = rest.list_training_runs(_RUNS_AT_ONCE, offset, project_id=project_id).result()
        found.update((each.training_run_id, each) for each in page.training_runs)
        offset += len(page.training_runs)
        if not page.training_runs or offset >= page.cursor.total_count:
            return [each for each in found.values() if filters.admit_run(each)]


def checkpoints(rest: RestClient, filters: Filters) -> list[Checkpoint]:
    """All checkpoints that a filter admits, newest first.

    Raises:
        NotFound: there is no such run.
    """
    if filters.run is None:
        listed = APIFuture.of(catalogue.list_all(rest)).result()
    else:
        listed = of_run(rest, filters.run)
    found = [each for each in listed if filters.admit(each)]
    return sorted(found, key=lambda each: each.time, reverse=True)


def run(rest: RestClient, run_id: str) -> TrainingRun:
    """One run; raises `NotFound` where there is none."""
    _check_run(run_id)
    try:
        return rest.get_training_run(run_id).result()
    except NotFoundError as error:
        raise _no_run(run_id) from error


def of_run(rest: RestClient, run_id: str) -> list[Checkpoint]:
    """The checkpoints of a run; raises `NotFound` where there is no such run."""
    _check_run(run_id)
    try:
        return rest.list_checkpoints(run_id).result().checkpoints
    except NotFoundError as error:
        raise _no_run(run_id) from error


def one(rest: RestClient, path: str) -> Checkpoint:
    """The checkpoint of a path.

    Raises:
        NotFound: there is none.
        InvalidPath: it is no path.
    """
    parsed = parse_path(path)
    found = [each for each in of_run(rest, parsed.run_id) if each.tinker_path == path]
    if not found:
        raise NotFound(
            f"There is no checkpoint {path}: it was never saved, was deleted, or has expired. "
            f"'everstep checkpoint list --run {parsed.run_id}' lists what is there."
        )
    return found[0]


def _check_run(run_id: str) -> None:
    """Raise `WrongUsage` for no id at all, such as a variable that is empty: it would mean all."""
    if not run_id.strip():
        raise WrongUsage("the run's id is empty; 'everstep run list' lists them.")


def _no_run(run_id: str) -> NotFound:
    return NotFound(f"There is no run {run_id}. 'everstep run list' lists those that are there.")
