"""What a run's state descends from: checkpoints, the nearest first.

A checkpoint's parent is what its state stood on: the training checkpoint that the run saved last
under another name, or the one that it was created from or has loaded since. It is the same
whether a save is carried out for the first time or again after a crash: the line begins with what
the manifest says of the state that a run is brought back from, and follows the operations that
the ledger has after it.

A save is written behind the run, and may fail after others were captured. Until that is known it
is in the line by its operation; the worker, which writes in order, leaves out what it could not
write.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

Line = Sequence[tuple[str | None, str]]
"""Paths, the nearest first, each with the operation that is writing it; None: it is written."""


class Lineage:
    """The line of one run."""

    def __init__(self) -> None:
        self._line: list[tuple[str | None, str]] = []

    def begin(self, paths: Sequence[str]) -> None:
        """Stand on what was loaded: its path, and those that it descends from."""
        self._line = [(None, path) for path in paths]

    def line(self, besides: str | None = None) -> Line:
        """What the state descends from now.

        Args:
            besides: a path that is left out: what replaces a checkpoint is no child of it.
        """
        return [each for each in self._line if each[1] != besides]

    def saving(self, request_id: str, path: str) -> None:
        """Stand on a training checkpoint that is being written."""
        self._line.insert(0, (request_id, path))

    def saved(self, request_id: str, path: str) -> None:
        """Know it as written, and so what is its parent."""
        index = self._index(request_id)
        if index is not None:
            self._line[index:] = _known(path, self._line[index + 1 :])

    def failed(self, request_id: str) -> None:
        """Know that it could not be written."""
        index = self._index(request_id)
        if index is not None:
            del self._line[index]

    def stand_on(self, path: str) -> None:
        """Stand on a training checkpoint that was written before the run was brought back."""
        self._line = _known(path, self._line)

    def _index(self, request_id: str) -> int | None:
        """Where a save is in the line; None where a load has put something else there."""
        found = (i for i, (writing, _) in enumerate(self._line) if writing == request_id)
        return next(found, None)


def _known(path: str, behind: list[tuple[str | None, str]]) -> list[tuple[str | None, str]]:
    """A checkpoint and its parent; what is farther is never asked for."""
    return [(None, path), *[each for each in behind if each[1] != path][:1]]


def parent_of(line: Line, unwritten: Collection[str]) -> list[str]:
    """The parent of what is saved, if it has one.

    Args:
        line: what its state descends from.
        unwritten: operations whose checkpoints could not be written.
    """
    return standing(line, unwritten)[:1]


def standing(line: Line, unwritten: Collection[str]) -> list[str]:
    """What a snapshot says of its state: what it stands on, and the parent of that; see above."""
    written = [path for writing, path in line if writing not in unwritten]
    return written[:1] + [path for path in written if path != written[0]][:1]
