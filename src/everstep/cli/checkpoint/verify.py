"""Verification of checkpoints by the service, or by downloading them."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from everstep.cli.checkpoint import tables
from everstep.cli.checkpoint.download import download_and_read
from everstep.cli.common import listing, names, outcomes
from everstep.cli.common.errors import Code
from everstep.cli.common.filters import Filters
from everstep.cli.common.progress_bars import count_bar
from everstep.cli.common.target import Service, Target
from everstep.wire.messages.inspection import CheckpointRequest, VerifyCheckpointResponse

_TIMEOUT = 3600.0


def verify_checkpoints(target: Target, paths: Sequence[str], wanted: Filters) -> None:
    """Verify checkpoints and print the results.

    Args:
        target: the service.
        paths: paths of the checkpoints, or empty for those that match the filters.
        wanted: filters of checkpoints.

    Raises:
        typer.Exit: with 1 if a checkpoint is damaged, else with the code of the first failure.
    """
    with target.service() as service:
        chosen = list(paths)
        if not chosen:
            wanted = names.of_filters(service.rest, wanted)
            chosen = [each.tinker_path for each in listing.checkpoints(service.rest, wanted)]
        found: list[VerifyCheckpointResponse] = []
        with count_bar("verifying", len(chosen), quiet=target.as_json) as advance:

            def verify_one(path: str) -> None:
                found.append(_verify(service, names.checkpoint_path(service.rest, path)))
                advance(1)

            done = outcomes.for_each(chosen, verify_one)
    tables.print_verified(found, done, target.as_json)
    codes = [Code.FAILED for each in found if not each.ok]
    codes += [each.code for each in done if each.error is not None]
    if codes:
        raise typer.Exit(codes[0])


def _verify(service: Service, path: str) -> VerifyCheckpointResponse:
    if service.everstep is None:
        return download_and_read(service, path)
    return service.call(
        "/everstep/checkpoints/verify",
        CheckpointRequest(tinker_path=path),
        VerifyCheckpointResponse,
        timeout=_TIMEOUT,
    )
