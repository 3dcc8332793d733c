"""Content: a request or result on its way into a row, and the columns that keep it there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from everstep.ledger.payload_log.log import Location
from everstep.ledger.payload_log.records import content_digest
from everstep.spool import Data, as_bytes, viewed

Column = Literal["payload", "result"]


@dataclass(frozen=True)
class Content:
    """A request or result.

    Attributes:
        data: the bytes.
        at: where they lie in the payload log, or None where the row holds them.
        digest: their BLAKE3 where it is known, although they are not in the log.
    """

    data: Data = field(repr=False)
    at: Location | None = None
    digest: bytes | None = field(default=None, repr=False)

    def columns(self, name: Column) -> dict[str, Any]:
        """Return the values of the columns that keep it."""
        if self.at is None:
            return {name: as_bytes(self.data), **location_columns(name, None)}
        kept = b"" if name == "payload" else None  # a row always has a payload
        return {name: kept, **location_columns(name, self.at)}

    def has_digest(self, digest: bytes) -> bool:
        """Return whether its bytes have a digest."""
        known = self.at.digest if self.at is not None else self.digest
        return (known or digest_of(self.data)) == digest


def digest_of(data: Data) -> bytes:
    """Return the BLAKE3 of a content."""
    with viewed(data) as view:
        return content_digest(view)


def location_columns(name: Column, at: Location | None) -> dict[str, Any]:
    """Return the values of the columns that keep a location."""
    values = (at.segment, at.offset, at.size) if at is not None else (None, None, None)
    return dict(zip(column_names(name), values, strict=True))


def column_names(name: Column) -> tuple[str, str, str]:
    """Return the names of the columns that keep a location."""
    return f"{name}_segment", f"{name}_offset", f"{name}_size"


def location_of(row: Mapping[str, Any], name: Column) -> Location | None:
    """Return the location that a row keeps, or None if it keeps none."""
    segment, offset, size = (row[each] for each in column_names(name))
    return None if segment is None else Location(segment, offset, size, row[f"{name}_digest"])
