"""Deletion of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from everstep.cli.checkpoint import tables
from everstep.cli.common import listing, names, outcomes, output
from everstep.cli.common.errors import Code, WrongUsage
from everstep.cli.common.filters import Filters
from everstep.cli.common.outcomes import Outcome
from everstep.cli.common.progress_bars import count_bar
from everstep.cli.common.target import Service, Target
from everstep.wire.messages.publication import DeleteCheckpointsRequest, DeleteCheckpointsResponse
from everstep.wire.messages.responses import Checkpoint
from everstep.wire.paths import SCHEME, parse_path

_BATCH_SIZE = 1000


def delete_checkpoints(
    target: Target, paths: Sequence[str], wanted: Filters, *, dry_run: bool, yes: bool
) -> None:
    """Delete checkpoints after a confirmation, and print the outcomes.

    Args:
        target: the service.
        paths: paths of the checkpoints, or empty for those that match the filters.
        wanted: filters of checkpoints.
        dry_run: only list them.
        yes: skip the confirmation.

    Raises:
        WrongUsage: JSON is wanted, which allows no question, without ``yes`` or ``dry_run``, or one
            is neither a path nor RUN:NAME. Nothing is deleted.
        InvalidPath: a path is malformed. Nothing is deleted.
        Refused: the answer was no.
    """
    if target.as_json and not (yes or dry_run):
        raise WrongUsage("--json asks no questions: give --yes or --dry-run with it.")
    for each in paths:
        if each.startswith(SCHEME):
            parse_path(each)
        else:
            names.split_checkpoint(each)
    with target.service() as service:
        chosen, absent = _choose(service, paths, wanted)
        if not target.as_json and (chosen or not absent):
            tables.print_list(chosen, len(chosen))
        if chosen and not dry_run and not yes:
            output.confirm(f"Delete {tables.total_size(chosen)}?", "Nothing was deleted.")
        chosen_paths = [each.tinker_path for each in chosen]
        if dry_run:
            done = [Outcome(each) for each in chosen_paths if target.as_json]
        else:
            done = delete_paths(service, chosen_paths)
        freeable = done and service.everstep is not None and not dry_run
    outcomes.report([*absent, *done], "deleted", target.as_json)
    if freeable and not target.as_json:
        output.messages().print("'everstep checkpoint gc' frees their files.")


def _choose(
    service: Service, paths: Sequence[str], wanted: Filters
) -> tuple[list[Checkpoint], list[Outcome]]:
    """Return the checkpoints to delete, and the failures of paths that don't exist."""
    if not paths:
        return listing.checkpoints(service.rest, names.of_filters(service.rest, wanted)), []
    found: list[Checkpoint] = []

    def find(path: str) -> None:
        known = names.checkpoint_path(service.rest, path)
        found.append(listing.checkpoint(service.rest, known))

    searched = outcomes.for_each(paths, find)
    return found, [each for each in searched if each.error is not None]


def delete_paths(service: Service, paths: Sequence[str]) -> list[Outcome]:
    """Delete checkpoints: in batches with Everstep's own route, else one by one.

    Args:
        service: the service.
        paths: paths of the checkpoints.
    """
    done: list[Outcome] = []
    if not paths:
        return done
    with count_bar("deleting", len(paths), quiet=service.target.as_json) as advance:
        if service.everstep is None:
            remove = service.rest.delete_checkpoint_from_tinker_path
            for path in paths:
                done += outcomes.for_each([path], lambda one: remove(one).result())
                advance(1)
            return done
        for start in range(0, len(paths), _BATCH_SIZE):
            request = DeleteCheckpointsRequest(
                tinker_paths=list(paths[start : start + _BATCH_SIZE])
            )
            answer = service.call(
                "/everstep/checkpoints/delete", request, DeleteCheckpointsResponse
            )
            done += [
                Outcome(each.tinker_path, each.error, Code.FAILED if each.error else Code.DONE)
                for each in answer.results
            ]
            advance(len(answer.results))
    return done
