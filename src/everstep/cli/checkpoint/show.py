"""Checkpoints, listed or one by one."""

from __future__ import annotations

from everstep.cli.checkpoint import tables
from everstep.cli.common import listing, names, output
from everstep.cli.common.filters import Filters
from everstep.cli.common.target import Target
from everstep.client._transport.errors import APIStatusError


def print_checkpoints(target: Target, wanted: Filters, limit: int) -> None:
    """Print the checkpoints that match, newest first.

    Args:
        target: the service.
        wanted: filters of checkpoints.
        limit: maximum number of rows, or 0 for all.
    """
    with target.reader() as service:
        found = listing.checkpoints(service.rest, names.of_filters(service.rest, wanted))
    shown = found[: limit or None]
    if target.as_json:
        content = [each.model_dump(mode="json") for each in shown]
        output.print_json({"checkpoints": content, "total": len(found)})
    else:
        tables.print_list(shown, len(found))


def print_checkpoint(target: Target, path: str) -> None:
    """Print the details of a checkpoint. Raises `NotFound`."""
    with target.reader() as service:
        path = names.checkpoint_path(service.rest, path)
        checkpoint = listing.checkpoint(service.rest, path)
        try:
            trained = service.rest.get_weights_info_by_tinker_path(path).result()
        except APIStatusError:
            trained = None  # the hosted service has it for some kinds only
        details = service.details(path)
    if target.as_json:
        output.print_json(tables.info_json(checkpoint, trained, details))
    else:
        tables.print_info(checkpoint, trained, details)
