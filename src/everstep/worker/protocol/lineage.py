"""Lineage: the checkpoints that a run's state descends from, the nearest first.

A checkpoint's parent is the training checkpoint that the run saved last under another name, or the
one that it was created from or has loaded since. A save that is executed again after a crash gets
the same parent: a restored run's lineage begins with that of the manifest it is restored from, and
the ledger's later operations are applied to it.

A save is written in the background and may fail after later ones were captured. Until its outcome
is known, its entry in the lineage names its operation. The worker writes in order, and leaves out
the entries of writes that failed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

Line = Sequence[tuple[str | None, str]]
"""Paths, the nearest first, each with the operation that is writing it; None once it is written."""


class Lineage:
    """The lineage of one run."""

    def __init__(self) -> None:
        self._line: list[tuple[str | None, str]] = []

    def begin(self, paths: Sequence[str]) -> None:
        """Start over from a loaded checkpoint: its path, then those that it descends from."""
        self._line = [(None, path) for path in paths]

    def line(self, besides: str | None = None) -> Line:
        """The checkpoints that the state descends from now.

        Args:
            besides: a path to leave out: a checkpoint is no child of the one that it replaces.
        """
        return [each for each in self._line if each[1] != besides]

    def saving(self, request_id: str, path: str) -> None:
        """Add a training checkpoint that is being written."""
        self._line.insert(0, (request_id, path))

    def saved(self, request_id: str, path: str) -> None:
        """Mark a save as written."""
        index = self._index(request_id)
        if index is not None:
            self._line[index:] = _known(path, self._line[index + 1 :])

    def failed(self, request_id: str) -> None:
        """Remove a save that failed."""
        index = self._index(request_id)
        if index is not None:
            del self._line[index]

    def stand_on(self, path: str) -> None:
        """Add a training checkpoint that was written before the run was restored."""
        self._line = _known(path, self._line)

    def _index(self, request_id: str) -> int | None:
        """The position of a save, or None after a load has started the lineage over."""
        found = (i for i, (writing, _) in enumerate(self._line) if writing == request_id)
        return next(found, None)


def _known(path: str, behind: list[tuple[str | None, str]]) -> list[tuple[str | None, str]]:
    """A checkpoint and its parent. Older ancestors are never needed."""
    return [(None, path), *[each for each in behind if each[1] != path][:1]]


def parent_of(line: Line, unwritten: Collection[str]) -> list[str]:
    """The parent of a state that is saved, if it has one.

    Args:
        line: the lineage of the state.
        unwritten: the operations whose checkpoints could not be written.
    """
    return standing(line, unwritten)[:1]


def standing(line: Line, unwritten: Collection[str]) -> list[str]:
    """The lineage that a snapshot records: its state's parent, and the parent of that."""
    written = [path for writing, path in line if writing not in unwritten]
    return written[:1] + [path for path in written if path != written[0]][:1]
