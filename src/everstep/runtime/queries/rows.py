"""Rows: lists in their wire form, without the rows that no client could read.

A record that an earlier release accepted may hold text that can't be encoded, or be damaged. It
takes itself out of a list, not the list with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from everstep.logs import get_logger
from everstep.runtime.errors import Rejected
from everstep.wire.base import Response

Row = TypeVar("Row")
Built = TypeVar("Built", bound=Response)
_log = get_logger("everstep.queries")


def servable(
    rows: Iterable[Row], build: Callable[[Row], Built], name: Callable[[Row], str]
) -> list[Built]:
    """Build the wire form of each row, and leave out those that can't be sent.

    Args:
        rows: records of the ledger.
        build: makes a row's wire form. May raise ValueError.
        name: gives a row's id. The log has it for each row that is left out.
    """
    found = []
    for row in rows:
        try:
            built = build(row)
            built.model_dump_json()
        except ValueError as error:
            _log.warning("record left out of a list", record=name(row), reason=str(error))
        else:
            found.append(built)
    return found


def servable_one(built: Built, name: str) -> Built:
    """Return the wire form of one record, or raise `Rejected` (422) if it can't be sent."""
    if not servable([built], lambda each: each, lambda _: name):
        raise Rejected(
            422,
            f"The record of {name} holds text that can't be sent (a lone surrogate), which an "
            "earlier release accepted. What it belongs to can still be trained and loaded.",
        )
    return built
