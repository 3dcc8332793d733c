"""``everstep checkpoint delete``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from everstep.cli import filters
from everstep.cli.completion import SomeCheckpoints
from everstep.cli.errors import WrongUsage
from everstep.cli.options import DryRun, Yes
from everstep.cli.target import Service, Target, with_target

if TYPE_CHECKING:
    from everstep.cli.outcomes import Outcome
    from everstep.wire.responses import Checkpoint

_AT_ONCE = 1000


@with_target
def delete(
    target: Target,
    paths: SomeCheckpoints = None,
    run: filters.Run = None,
    kind: filters.Kind = None,
    before: filters.Before = None,
    after: filters.After = None,
    name: filters.Name = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Delete checkpoints for good: those of these paths, or all that the filters admit.

    Says which, and how much that is, and asks.
    """
    from everstep.cli import checkpoint_views, outcomes, output
    from everstep.wire.paths import parse_path

    wanted = filters.Filters.of(run, kind, before, after, name)
    if bool(paths) == wanted.given:
        raise WrongUsage("give paths, or filters: --run, --kind, --before, --after, --name.")
    if target.as_json and not (yes or dry_run):
        raise WrongUsage("--json asks no question: give --yes or --dry-run with it.")
    for each in paths or []:
        parse_path(each)
    with target.service() as service:
        doomed, absent = _chosen(service, paths or [], wanted)
        if not target.as_json and (doomed or not absent):
            checkpoint_views.print_list(doomed, len(doomed))
        if doomed and not dry_run and not yes:
            output.agree(f"Delete {checkpoint_views.total_size(doomed)}?", "Nothing was deleted.")
        gone = [each.tinker_path for each in doomed]
        if dry_run:
            done = [outcomes.Outcome(each) for each in gone if target.as_json]
        else:
            done = _delete(service, gone)
        freed = done and service.everstep is not None and not dry_run
    outcomes.tell([*absent, *done], "deleted", target.as_json)
    if freed and not target.as_json:
        output.messages().print("'everstep checkpoint gc' frees their files now.")


def _chosen(
    service: Service, paths: list[str], wanted: filters.Filters
) -> tuple[list[Checkpoint], list[Outcome]]:
    """The checkpoints that are meant, and what is said of paths where there is none."""
    from everstep.cli import listing, outcomes

    if not paths:
        return listing.checkpoints(service.rest, wanted), []
    found: list[Checkpoint] = []

    def look(path: str) -> None:
        found.append(listing.one(service.rest, path))

    looked = outcomes.each(paths, look)
    return found, [each for each in looked if each.error is not None]


def _delete(service: Service, paths: list[str]) -> list[Outcome]:
    """Delete them: with Everstep's own call many at once, else one after the other."""
    from everstep.cli import outcomes, output
    from everstep.cli.errors import Code
    from everstep.wire.publication import DeleteCheckpointsRequest, DeleteCheckpointsResponse

    done: list[Outcome] = []
    if not paths:
        return done
    with output.steps("deleting", len(paths), quiet=service.target.as_json) as advance:
        if service.everstep is None:
            remove = service.rest.delete_checkpoint_from_tinker_path
            for path in paths:
                done += outcomes.each([path], lambda one: remove(one).result())
                advance(1)
            return done
        for start in range(0, len(paths), _AT_ONCE):
            asked = DeleteCheckpointsRequest(tinker_paths=paths[start : start + _AT_ONCE])
            answer = service.ask("/everstep/checkpoints/delete", asked, DeleteCheckpointsResponse)
            done += [
                outcomes.Outcome(
                    each.tinker_path, each.error, Code.FAILED if each.error else Code.DONE
                )
                for each in answer.results
            ]
            advance(len(answer.results))
    return done
