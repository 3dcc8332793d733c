"""PayloadLog: the seam between the ledger and where large requests and results lie."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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


@dataclass(frozen=True)
class FilePart:
    """A part of a file.

    Attributes:
        path: the file.
        offset: where the part begins.
    """

    path: Path
    offset: int


class PayloadLog(Protocol):
    """Contents in segments. Segments are only ever appended to, then dropped whole.

    Every method may be called from any thread, and blocks.
    """

    def append(self, content: bytes | memoryview, digest: bytes, stream: Stream) -> Location:
        """Write a content and return once it is durable.

        The segment is kept until `settle` is called for the location, named by rows or not.

        Args:
            content: the bytes.
            digest: their BLAKE3.
            stream: what it is.

        Raises:
            OSError: it can't be written. Nothing names what was written of it.
        """

    def settle(self, location: Location) -> bool:
        """Let go of a content that was appended or held.

        The row that names an appended one is queued, or none ever will be.

        Returns:
            Whether its segment was released meanwhile, and may be droppable now.
        """

    def verify(self, location: Location) -> None:
        """Check a content, holding little of it in memory. Raises as `read` does."""

    def hold(self, location: Location) -> bool:
        """Keep a content where it is until `settle` is called for it, named by rows or not.

        Returns:
            False where its segment is gone. Then its row may name another location.
        """

    def file(self, location: Location) -> FilePart | None:
        """Return the part of a file that holds a content, or None where no file does."""

    def read(self, location: Location) -> bytes:
        """Return a content, verified.

        Raises:
            PayloadUnreadable: it is missing, or not what was written.
        """

    def copy(self, locations: Sequence[Location], stream: Stream) -> list[Location]:
        """Write contents again, each verified, and return once all are durable.

        Args:
            locations: where they lie.
            stream: what they are.

        Returns:
            The locations of the copies, in order. Each is to be settled, as an appended one.

        Raises:
            PayloadUnreadable: one of them is missing or damaged.
            OSError: one can't be written. Nothing names what was written.
        """

    def size(self, segment: int) -> int:
        """Return the bytes that a segment takes. 0 where it is missing."""

    def released(self, segments: Iterable[int]) -> None:
        """Note that rows no longer name contents of these segments."""

    def droppable(self) -> list[int]:
        """Return segments that lost names, take no more contents and hold none that is unsettled.

        Each is returned once. The ones that rows still name have to be released again.
        """

    def drop(self, segments: Iterable[int]) -> None:
        """Remove segments that no row names, seen after `droppable` returned them.

        One that is held since stays: it is droppable again once it is settled.
        """

    def close(self) -> None:
        """Release the files."""
