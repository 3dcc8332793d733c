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
    from everstep.cli import checkpoint_views, listing, outcomes, output

    wanted = filters.Filters.of(run, kind, before, after, name)
    if bool(paths) == wanted.given:
        raise WrongUsage("give paths, or filters: --run, --kind, --before, --after, --name.")
    if target.as_json and not (yes or dry_run):
        raise WrongUsage("--json asks no question: give --yes or --dry-run with it.")
    with target.service() as service:
        doomed = listing.chosen(service.rest, paths or [], wanted)
        if not target.as_json:
            checkpoint_views.print_list(doomed, len(doomed))
        elif dry_run:
            output.print_json({"results": [{"tinker_path": each.tinker_path} for each in doomed]})
        if dry_run or not doomed:
            return
        if not yes:
            output.agree(f"Delete {checkpoint_views.total_size(doomed)}?", "Nothing was deleted.")
        done = _delete(service, [each.tinker_path for each in doomed])
    outcomes.tell(done, "deleted", target.as_json)
    if service.everstep is not None and not target.as_json:
        output.messages().print("'everstep checkpoint gc' frees their files now.")


def _delete(service: Service, paths: list[str]) -> list[Outcome]:
    """Delete them: with Everstep's own call many at once, else one after the other."""
    from everstep.cli import outcomes, output
    from everstep.cli.errors import Code
    from everstep.wire.publication import DeleteCheckpointsRequest, DeleteCheckpointsResponse

    done: list[Outcome] = []
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
