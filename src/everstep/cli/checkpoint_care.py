"""``everstep checkpoint verify`` and ``gc``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from everstep.cli import filters
from everstep.cli.completion import SomeCheckpoints
from everstep.cli.errors import Code, WrongUsage
from everstep.cli.options import DryRun
from everstep.cli.target import Service, Target, with_target

if TYPE_CHECKING:
    from everstep.wire.inspection import VerifyCheckpointResponse

_SECONDS = 3600.0


@with_target
def verify(
    target: Target,
    paths: SomeCheckpoints = None,
    run: filters.Run = None,
    kind: filters.Kind = None,
    before: filters.Before = None,
    after: filters.After = None,
    name: filters.Name = None,
) -> None:
    """Read checkpoints through and hash them, where they lie: those of these paths, or all.

    Another service than Everstep has no hashes to compare with: there each is fetched, and its
    tensors are read. Exits with 1 when something is damaged.
    """
    from everstep.cli import checkpoint_views, listing, outcomes, output

    wanted = filters.Filters.of(run, kind, before, after, name)
    if paths and wanted.given:
        raise WrongUsage("give paths, or filters.")
    with target.service() as service:
        chosen = paths or [each.tinker_path for each in listing.checkpoints(service.rest, wanted)]
        found: list[VerifyCheckpointResponse] = []
        with output.steps("verifying", len(chosen), quiet=target.as_json) as advance:

            def verify_one(path: str) -> None:
                found.append(_verified(service, path))
                advance(1)

            looked = outcomes.each(chosen, verify_one)
    checkpoint_views.tell_verified(found, looked, target.as_json)
    codes = [Code.FAILED for each in found if not each.ok]
    codes += [each.code for each in looked if each.error is not None]
    if codes:
        raise typer.Exit(codes[0])


def _verified(service: Service, path: str) -> VerifyCheckpointResponse:
    from everstep.cli.download_work import fetched_and_read
    from everstep.wire.inspection import CheckpointRequest, VerifyCheckpointResponse

    if service.everstep is None:
        return fetched_and_read(service, path)
    asked = CheckpointRequest(tinker_path=path)
    return service.ask(
        "/everstep/checkpoints/verify", asked, VerifyCheckpointResponse, timeout=_SECONDS
    )


@with_target
def gc(
    target: Target,
    grace: Annotated[
        str, typer.Option(metavar="SPAN", help="What is younger than that stays.")
    ] = "1h",
    dry_run: DryRun = False,
) -> None:
    """Have the service free the disk of what expired, and of files that no checkpoint names.

    It does so by itself now and then.
    """
    from everstep.cli import vault_work
    from everstep.wire.upkeep import CollectRequest, CollectResponse

    asked = CollectRequest(grace_seconds=filters.read_span(grace), dry_run=dry_run)
    with target.service() as service:
        service.only_everstep("collection")
        done = service.ask("/everstep/vault/collect", asked, CollectResponse, timeout=_SECONDS)
    vault_work.print_collected(done, target.as_json)
