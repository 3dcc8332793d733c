"""Block traces: every block that a file system wrote, and the possible states after a power cut.

A `RecordedFS` is a real file system on a disk that keeps a log of writes, flushes, and the reports
of a program. A disk may lose or reorder writes that were not flushed. So after a cut anywhere in
the log, all writes before the last flush are there, and any subset of the sectors of later writes.
`Trace.states` draws such states, `Replay` mounts them.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from everstep.testing import devices
from everstep.testing.blockfile import FLUSH, MARK, RECORD

_BLOCK = 4096
_TOGETHER = 256
_PATIENCE = 60.0
_ATOMS = (512, 4096)
_SUBSETS = ("none", "all", "half", "few", "most", "prefix")


class RecordedFS:
    """A mounted file system, initially empty, that logs every write.

    Args:
        directory: holds image, log and mount points. A memory file system is fastest.
        kind: ``ext4`` or ``xfs``.
        size: size of the disk in bytes, None for the smallest useful one.

    Attributes:
        root: the mount point.
        marks: a file for reports. A write to it is in the log, in order, when it returns.
    """

    def __init__(self, directory: Path, kind: str = "ext4", *, size: int | None = None) -> None:
        self._directory = directory
        self._kind = kind
        self._size = size or devices.SMALLEST[kind]

    def __enter__(self) -> RecordedFS:
        self._base = Path(tempfile.mkdtemp(prefix="recordedfs-", dir=self._directory))
        self._fuse = self._base / "fuse"
        self.root = self._base / "root"
        self.marks = self._fuse / "marks"
        self._log = self._base / "log"
        self._server: subprocess.Popen[bytes] | None = None
        try:
            for each in (self._fuse, self.root):
                each.mkdir()
            devices.make(self._kind, self._base / "image", self._size)
            shutil.copyfile(self._base / "image", self._base / "pristine")
            self._serve()
            devices.mount_image(self._fuse / "disk", self.root, self._kind)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self.root, self._fuse):
            devices.release(each)
        if self._server is not None:
            self._server.communicate(timeout=_PATIENCE)
        shutil.rmtree(self._base)

    def trace(self) -> Trace:
        """Return the log up to now, or up to the unmount."""
        return Trace.read(self._base / "pristine", self._log, self._kind)

    def _serve(self) -> None:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        try:
            options = f"fd={device},rootmode=40000,user_id=0,group_id=0"
            devices.mount("recorded", self._fuse, "fuse", options)
            files = [str(self._base / "image"), str(self._log)]
            self._server = subprocess.Popen(
                [sys.executable, "-m", "everstep.testing.blockfile", str(device), *files],
                stdin=subprocess.PIPE,
                pass_fds=[device],
            )
        finally:
            os.close(device)


def why_not(kind: str = "ext4") -> str | None:
    """Return why nothing can be recorded on this machine, or None if it can."""
    if not Path("/dev/fuse").exists():
        return "there is no FUSE"
    return devices.why_not(kind)


@dataclass(frozen=True)
class Entry:
    """A line of the log: a write with its data, a flush, or a mark."""

    kind: bytes
    offset: int
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class State:
    """A possible state of a disk after a power cut.

    Attributes:
        position: the cut comes before this entry of the log.
        flushed: all entries before this one survive.
        kept: the parts of later entries that survive: entry, first byte, byte after the last.
    """

    position: int
    flushed: int
    kept: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Trace:
    """The log of a disk.

    Attributes:
        kind: kind of file system.
        size: size of the disk.
        pristine: its initial blocks by number, without those of zeros.
        entries: the log.
    """

    kind: str
    size: int
    pristine: dict[int, bytes] = field(repr=False)
    entries: list[Entry] = field(repr=False)

    @classmethod
    def read(cls, pristine: Path, log: Path, kind: str) -> Trace:
        """Read a recording."""
        blocks = {}
        with pristine.open("rb") as file:
            for number in range(pristine.stat().st_size // _BLOCK):
                if any(block := file.read(_BLOCK)):
                    blocks[number] = block
        entries = []
        data = log.read_bytes()
        place = 0
        while place < len(data):
            mark, offset, length = RECORD.unpack_from(data, place)
            place += RECORD.size
            entries.append(Entry(mark, offset, data[place : place + length]))
            place += length
        return cls(kind, pristine.stat().st_size, blocks, entries)

    @property
    def flushes(self) -> int:
        """Number of flushes."""
        return sum(entry.kind == FLUSH for entry in self.entries)

    def marks(self, position: int) -> list[bytes]:
        """Return the program's reports before an entry."""
        said = b"".join(each.data for each in self.entries[:position] if each.kind == MARK)
        return said.splitlines()

    def states(self, chance: random.Random, count: int, *, start: int = 0) -> list[State]:
        """Draw different states, by position.

        Args:
            chance: the source of randomness.
            count: the number of states. Fewer are drawn if there are not enough.
            start: no cut comes before this entry.
        """
        drawn: set[State] = set()
        for _ in range(20 * count):
            if len(drawn) == count:
                break
            drawn.add(self._draw(chance, chance.randint(start, len(self.entries))))
        return sorted(drawn, key=lambda state: (state.position, state.kept))

    def _draw(self, chance: random.Random, position: int) -> State:
        flushed = position
        while flushed and self.entries[flushed - 1].kind != FLUSH:
            flushed -= 1
        atom = chance.choice(_ATOMS)
        parts = [
            (number, first, min(first + atom, len(self.entries[number].data)))
            for number in range(flushed, position)
            for first in range(0, len(self.entries[number].data), atom)
            if self.entries[number].kind not in (FLUSH, MARK)
        ]
        return State(position, flushed, tuple(_subset(chance, parts)))


def _subset(chance: random.Random, parts: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    how = chance.choice(_SUBSETS)
    if how == "prefix":
        return parts[: chance.randint(0, len(parts))]
    share = {"none": 0.0, "all": 1.0, "half": 0.5, "few": 0.1, "most": 0.9}[how]
    return [part for part in parts if chance.random() < share]


class Replay:
    """Makes states of a disk real, one after the other, by position.

    Args:
        trace: the log.
        directory: where images are made.
    """

    def __init__(self, trace: Trace, directory: Path) -> None:
        self._trace = trace
        self._directory = directory
        self._blocks = dict(trace.pristine)
        self._done = 0

    @contextmanager
    def mounted(self, state: State) -> Iterator[Path]:
        """The root of the file system in that state, mounted as after a restart."""
        self._advance(state.flushed)
        base = Path(tempfile.mkdtemp(prefix="replay-", dir=self._directory))
        root = base / "root"
        try:
            root.mkdir()
            self._write(base / "image", state)
            devices.mount_image(base / "image", root, self._trace.kind)
            try:
                yield root
            finally:
                devices.release(root)
        finally:
            shutil.rmtree(base)

    def _advance(self, position: int) -> None:
        if position < self._done:
            self._blocks = dict(self._trace.pristine)
            self._done = 0
        for entry in self._trace.entries[self._done : position]:
            if entry.kind not in (FLUSH, MARK):
                _overlay(self._blocks, entry.offset, entry.data)
        self._done = position

    def _write(self, image: Path, state: State) -> None:
        handle = os.open(image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(handle, self._trace.size)
            for start, blocks in _runs(self._blocks):
                os.pwritev(handle, blocks, start * _BLOCK)
            for number, first, end in state.kept:
                entry = self._trace.entries[number]
                os.pwrite(handle, entry.data[first:end], entry.offset + first)
        finally:
            os.close(handle)


def _runs(blocks: dict[int, bytes]) -> Iterator[tuple[int, list[bytes]]]:
    """Blocks that lie side by side, with the number of the first."""
    start = last = -2
    run: list[bytes] = []
    for number in sorted(blocks):
        if number != last + 1 or len(run) == _TOGETHER:
            if run:
                yield start, run
            start, run = number, []
        run.append(blocks[number])
        last = number
    if run:
        yield start, run


def _overlay(blocks: dict[int, bytes], offset: int, data: bytes) -> None:
    while data:
        number, inside = divmod(offset, _BLOCK)
        part, data = data[: _BLOCK - inside], data[_BLOCK - inside :]
        old = blocks.get(number, bytes(_BLOCK))
        blocks[number] = old[:inside] + part + old[inside + len(part) :]
        offset += len(part)
