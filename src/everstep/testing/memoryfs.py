"""Model file system: the states that a power cut may leave behind a program. Needs no root.

    with Recorded(directory) as log:
        my_program(directory)
    state = log.crash(position, chance)
    state.write(elsewhere)          # now see how your program starts there

The program runs on a real directory while its calls are recorded. The model guarantees only what
POSIX does: the bytes of a file survive once it was fsynced, a name once its directory was. Bytes
that were not synced may be absent, partly there, or zeros of the right length. Names that were not
synced may be absent or still there. An *ordered* crash keeps the order of names, as journaling file
systems do. An unordered one keeps any of them. A rename never loses the file.

Calls that C code makes are not recorded. Writes through `open` are noticed at the next recorded
call (fsync, rename or link) or at the end.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

_ROOT = 0
_DELETED = " (deleted)"


@dataclass(frozen=True)
class Write:
    """Bytes written to a file. The file ends behind them if ``whole``."""

    node: int
    offset: int
    data: bytes = field(repr=False)
    whole: bool = False


@dataclass(frozen=True)
class Sync:
    """An fsync of a file or directory."""

    node: int


@dataclass(frozen=True)
class Names:
    """Names that change at once.

    Attributes:
        gained: directory, name and node of a new name.
        lost: directory and name of a removed name.
    """

    gained: tuple[int, str, int] | None = None
    lost: tuple[int, str] | None = None

    @property
    def directories(self) -> set[int]:
        """The directories whose names change."""
        return {each[0] for each in (self.gained, self.lost) if each is not None}


@dataclass(frozen=True)
class Mark:
    """A report of the program."""

    data: bytes


@dataclass(frozen=True)
class Crash:
    """The state after a crash: the content of each file, and the directories, by path."""

    position: int
    files: dict[str, bytes]
    directories: list[str]

    def write(self, directory: Path) -> None:
        """Write the state into an empty directory."""
        for name in self.directories:
            (directory / name).mkdir(parents=True)
        for name, content in self.files.items():
            (directory / name).write_bytes(content)


class Log:
    """The calls of a program, in order.

    Attributes:
        entries: the calls, and the program's reports between them.
        directories: the nodes that are directories.
    """

    def __init__(self) -> None:
        self.entries: list[Write | Sync | Names | Mark] = []
        self.directories = {_ROOT}

    def mark(self, data: bytes) -> None:
        """Record a report of the program."""
        self.entries.append(Mark(data))

    def said(self, position: int) -> list[bytes]:
        """Return the program's reports before an entry."""
        marks = (each.data for each in self.entries[:position] if isinstance(each, Mark))
        return b"".join(marks).splitlines()

    def crash(self, position: int, chance: random.Random, *, ordered: bool = False) -> Crash:
        """Return a possible state after a power cut before an entry.

        Args:
            position: the entry.
            chance: decides about everything that was not synced.
            ordered: whether a later change of names survives only if all earlier ones do.
        """
        tree = self._tree(position, chance, ordered)
        files: dict[str, bytes] = {}
        directories: list[str] = []
        self._walk(tree, _ROOT, "", files, directories, position, chance, {})
        return Crash(position, files, directories)

    def _walk(
        self,
        tree: dict[int, dict[str, int]],
        directory: int,
        prefix: str,
        files: dict[str, bytes],
        directories: list[str],
        position: int,
        chance: random.Random,
        contents: dict[int, bytes],
    ) -> None:
        for name, node in sorted(tree.get(directory, {}).items()):
            path = prefix + name
            if node in self.directories:
                directories.append(path)
                self._walk(tree, node, path + "/", files, directories, position, chance, contents)
            else:
                if node not in contents:
                    contents[node] = self._content(node, position, chance)
                files[path] = contents[node]

    def _tree(
        self, position: int, chance: random.Random, ordered: bool
    ) -> dict[int, dict[str, int]]:
        """Return the names by directory."""
        changes = [
            (number, each)
            for number, each in enumerate(self.entries[:position])
            if isinstance(each, Names)
        ]
        synced = {
            each.node: number
            for number, each in enumerate(self.entries[:position])
            if isinstance(each, Sync)
        }
        sure = [
            any(synced.get(where, -1) > number for where in each.directories)
            for number, each in changes
        ]
        if ordered:
            least = max((index + 1 for index, yes in enumerate(sure) if yes), default=0)
            end = chance.randint(least, len(changes))
            kept = [index < end for index in range(len(changes))]
        else:
            kept = [yes or chance.random() < 0.5 for yes in sure]
        tree: dict[int, dict[str, int]] = {}
        for (number, each), keep in zip(changes, kept, strict=True):
            if keep:
                both = ordered or each.lost is None or synced.get(each.lost[0], -1) > number
                _apply(tree, each, lose=both or each.gained is None or chance.random() < 0.5)
        return tree

    def _content(self, node: int, position: int, chance: random.Random) -> bytes:
        mine = [each for each in self.entries[:position] if getattr(each, "node", None) == node]
        sure = max((i + 1 for i, each in enumerate(mine) if isinstance(each, Sync)), default=0)
        content = b""
        for each in mine[:sure]:
            content = _written(content, each)
        lost = [each for each in mine[sure:] if isinstance(each, Write)]
        how = chance.choice(("absent", "zeros", "partial", "all"))
        if how == "absent" or not lost:
            return content
        if how == "partial":
            lost = lost[: chance.randint(1, len(lost))]
            last = lost[-1]
            cut = last.data[: chance.randint(0, len(last.data))]
            lost[-1] = Write(node, last.offset, cut, last.whole)
        for each in lost:
            content = _written(content, each, zeros=how == "zeros")
        return content


def _apply(tree: dict[int, dict[str, int]], change: Names, *, lose: bool) -> None:
    if change.lost is not None and lose:
        tree.setdefault(change.lost[0], {}).pop(change.lost[1], None)
    if change.gained is not None:
        directory, name, node = change.gained
        tree.setdefault(directory, {})[name] = node


def _written(content: bytes, entry: object, *, zeros: bool = False) -> bytes:
    if not isinstance(entry, Write):
        return content
    data = bytes(len(entry.data)) if zeros else entry.data
    before = content[: entry.offset].ljust(entry.offset, b"\0")
    return before + data + (b"" if entry.whole else content[entry.offset + len(data) :])


class Recorded:
    """Records the calls on a directory that is initially empty.

    Args:
        root: the directory.
    """

    def __init__(self, root: Path) -> None:
        self._root = os.path.realpath(root)
        self._log = Log()
        self._nodes = itertools.count(_ROOT + 1)
        self._tree: dict[int, dict[str, int]] = {_ROOT: {}}
        self._live: dict[int, bytes] = {}
        self._patches = ExitStack()
        self._after: dict[str, Callable[..., None]] = {
            "open": self._opened,
            "fsync": self._synced,
            "replace": self._renamed,
            "rename": self._renamed,
            "link": self._linked,
            "unlink": self._removed,
            "remove": self._removed,
            "rmdir": self._removed,
            "mkdir": self._made,
        }

    def __enter__(self) -> Log:
        for name, after in self._after.items():
            before = self._node if name in ("replace", "rename", "link") else _nothing
            wrapper = _followed(getattr(os, name), before, after)
            self._patches.enter_context(mock.patch.object(os, name, wrapper))
        self._patches.enter_context(mock.patch.object(os, "write", self._writing(os.write)))
        return self._log

    def __exit__(self, *_: object) -> None:
        self._patches.close()
        for path in sorted(Path(self._root).rglob("*")):
            self._node(path)

    # Calls

    def _writing(self, real: Callable[..., int]) -> Callable[..., int]:
        def write(handle: int, data: Any) -> int:
            node = self._node_of(handle)
            offset = os.lseek(handle, 0, os.SEEK_CUR) if node is not None else 0
            count = real(handle, data)
            if node is not None:
                self._append(Write(node, offset, bytes(memoryview(data).cast("B")[:count])))
            return count

        return write

    def _opened(self, path: Any, flags: int, *_: Any, **__: Any) -> None:
        if flags & os.O_CREAT:
            self._node(path)

    def _synced(self, handle: int) -> None:
        node = self._node_of(handle)
        if node is None:
            return
        if node in self._log.directories:
            for path in sorted(_path_of(handle).iterdir()):
                self._node(path)
        self._log.entries.append(Sync(node))

    def _renamed(self, source: Any, target: Any, **_: Any) -> None:
        here, there = self._place(Path(source)), self._place(Path(target))
        if here is not None and there is not None:
            self._append(Names((*there, self._tree[here[0]][here[1]]), here))
        elif there is not None:
            self._node(target)
        elif here is not None:
            self._append(Names(lost=here))

    def _linked(self, source: Any, target: Any, **_: Any) -> None:
        node, there = self._node(source), self._place(Path(target))
        if node is not None and there is not None:
            self._append(Names((*there, node)))

    def _removed(self, path: Any, **_: Any) -> None:
        place = self._place(Path(path))
        if place is not None and place[1] in self._tree[place[0]]:
            self._append(Names(lost=place))

    def _made(self, path: Any, *_: Any, **__: Any) -> None:
        self._node(path)

    # Nodes

    def _append(self, entry: Write | Names) -> None:
        self._log.entries.append(entry)
        if isinstance(entry, Names):
            _apply(self._tree, entry, lose=True)
        else:
            self._live[entry.node] = _written(self._live.get(entry.node, b""), entry)

    def _place(self, path: Path) -> tuple[int, str] | None:
        """Return the directory's node and the name, or None outside of the root."""
        absolute = Path(os.path.realpath(path.parent)) / path.name
        if not absolute.is_relative_to(self._root) or absolute == Path(self._root):
            return None
        directory = self._node(absolute.parent)
        return None if directory is None else (directory, absolute.name)

    def _node(self, named: Any, *_: Any, **__: Any) -> int | None:
        """Return the node of an existing path, recording it if it is new. None outside the root."""
        path = Path(named)
        if os.path.realpath(path) == self._root:
            return _ROOT
        place = self._place(path)
        if place is None:
            return None
        node = self._tree[place[0]].get(place[1])
        if not path.exists():
            return None
        if node is None:
            node = next(self._nodes)
            if path.is_dir():
                self._log.directories.add(node)
                self._tree[node] = {}
            self._append(Names((*place, node)))
        self._catch_up(node, path)
        return node

    def _node_of(self, handle: int) -> int | None:
        path = _path_of(handle)
        if not path.is_relative_to(self._root) or path.name.endswith(_DELETED):
            return None
        return self._node(path)

    def _catch_up(self, node: int, path: Path) -> None:
        """Record writes that were not intercepted."""
        if node not in self._log.directories and path.is_file():
            content = path.read_bytes()
            if content != self._live.get(node, b""):
                self._append(Write(node, 0, content, whole=True))


def _path_of(handle: int) -> Path:
    return Path(f"/proc/self/fd/{handle}").readlink()


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing: called before most calls."""


def _followed(
    real: Callable[..., Any], before: Callable[..., object], after: Callable[..., None]
) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        before(*arguments, **options)
        result = real(*arguments, **options)
        after(*arguments, **options)
        return result

    return call
