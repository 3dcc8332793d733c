"""Calls of the operating system that fail, hang or do nothing, as Python makes them.

What C code does by itself (SQLite, safetensors) is not seen; for that there are `crashfs`,
`blocktrace` and ``strace -e inject``.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest import mock

CHANGES = ("open", "write", "fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir")
Sort = Literal["files", "directories"]


class Calls:
    """The calls that change something below a directory, while this is entered.

    Args:
        root: the directory.
        before: called with each call's name and path; what it raises is the call's outcome.

    Attributes:
        count: how many there were.
    """

    def __init__(self, root: Path, before: Callable[[str, Path], None]) -> None:
        self._root = os.path.realpath(root)
        self._before = before
        self._patches = ExitStack()
        self.count = 0

    def __enter__(self) -> Calls:
        for name in CHANGES:
            real = getattr(os, name)
            self._patches.enter_context(mock.patch.object(os, name, self._watched(name, real)))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(subject: Any, *arguments: Any, **options: Any) -> Any:
            if name != "open" or (arguments and arguments[0] & os.O_CREAT):
                path = _path(subject)
                if path.startswith(self._root):
                    self.count += 1
                    self._before(name, Path(path))
            return real(subject, *arguments, **options)

        return call


@contextmanager
def failing(root: Path, name: str, nth: int, code: int) -> Iterator[Failing]:
    """Let the n-th call of a name fail; a later fsync of a file whose fsync failed is noted.

    Args:
        root: below which directory.
        name: of the call: ``write``, ``fsync``, …; ``any`` counts them all.
        nth: which, counted from 1.
        code: the error, as `errno.EIO`.
    """
    failure = Failing(name, nth, code)
    with Calls(root, failure.before):
        yield failure


class Failing:
    """What `failing` saw.

    Attributes:
        fired: whether the call came.
        path: of what.
        tried_again: files whose fsync was tried again after it had failed.
    """

    def __init__(self, name: str, nth: int, code: int) -> None:
        self._name = name
        self._left = nth
        self._code = code
        self._failed: set[Path] = set()
        self.fired = False
        self.path: Path | None = None
        self.tried_again: list[Path] = []

    def before(self, name: str, path: Path) -> None:
        """Fail, if it is the one."""
        if name == "fsync" and path in self._failed:
            self.tried_again.append(path)
        if self._name not in (name, "any"):
            return
        self._left -= 1
        if self._left == 0:
            self.fired = True
            self.path = path
            if name == "fsync" and path.is_file():
                self._failed.add(path)
            raise OSError(self._code, f"{os.strerror(self._code)} (the {name} that was to fail)")


@contextmanager
def without_fsync(which: Sort | int) -> Iterator[list[Path]]:
    """Have fsync do nothing: what a forgotten call would do.

    Args:
        which: all of files, all of directories, or only the n-th call of all, counted from 1.

    Yields:
        Of what fsync was called, in order, grows.
    """
    real = os.fsync
    called: list[Path] = []

    def fsync(handle: int) -> None:
        called.append(Path(_path(handle)))
        sort = "directories" if stat.S_ISDIR(os.fstat(handle).st_mode) else "files"
        if which not in (sort, len(called)):
            real(handle)

    with mock.patch.object(os, "fsync", fsync):
        yield called


def _path(subject: Any) -> str:
    if isinstance(subject, int):
        return str(Path(f"/proc/self/fd/{subject}").readlink())
    return str(Path(os.fspath(subject)).absolute())
