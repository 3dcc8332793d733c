"""PayloadLog: the seam between the ledger and where large requests and results lie."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

Stream = Literal["requests", "results"]
"""Contents of one stream share segments. Requests are dropped long before results."""


class PayloadUnreadable(Exception):
    """A content is missing or damaged. The text says what was found where."""


@dataclass(frozen=True)
class Location:
    """Where a content lies, as its row keeps it.

    Attributes:
        segment: the number of the segment.
        offset: where its record begins.
        size: bytes of the content.
        digest: the BLAKE3 of the content.
    """

    segment: int
    offset: int
    size: int
    digest: bytes = field(repr=False)


class PayloadLog(Protocol):
    """Contents in segments. Segments are only ever appended to, then dropped whole.

    Every method may be called from any thread, and blocks.
    """

    def append(self, content: bytes, digest: bytes, stream: Stream) -> Location:
        """Write a content and return once it is durable.

        The segment is kept until `settle` is called for the location, named by rows or not.

        Args:
            content: the bytes.
            digest: their BLAKE3.
            stream: what it is.

        Raises:
            OSError: it can't be written. Nothing names what was written of it.
        """

    def settle(self, location: Location) -> None:
        """Let go of an appended content: the row that names it is queued, or none ever will be."""

    def read(self, location: Location) -> bytes:
        """Return a content, verified.

        Raises:
            PayloadUnreadable: it is missing, or not what was written.
        """

    def released(self, segments: Iterable[int]) -> None:
        """Note that rows no longer name contents of these segments."""

    def droppable(self) -> list[int]:
        """Return segments that lost names, take no more contents and hold none that is unsettled.

        Each is returned once. The ones that rows still name have to be released again.
        """

    def drop(self, segments: Iterable[int]) -> None:
        """Remove segments that no row names, seen after `droppable` returned them."""

    def close(self) -> None:
        """Release the files."""
