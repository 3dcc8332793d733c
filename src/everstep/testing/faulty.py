"""Faulty calls: system calls of Python code that fail, hang or do nothing.

Calls of C code (SQLite, safetensors) are not intercepted. Use `crashfs`, `blocktrace` or
``strace -e inject`` for those.
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
    """Intercepts the calls that change something below a directory, while it is entered.

    Args:
        root: the directory.
        before: called with each call's name and path. An exception of it replaces the call.

    Attributes:
        count: number of calls.
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
    """Let the n-th call of a name fail. Records an fsync that is retried after its failure.

    Args:
        root: the directory below which calls count.
        name: the call: ``write``, ``fsync``, …, or ``any`` for all of them.
        nth: which call, counted from 1.
        code: the error, such as `errno.EIO`.
    """
    failure = Failing(name, nth, code)
    with Calls(root, failure.before):
        yield failure


class Failing:
    """The record of `failing`.

    Attributes:
        fired: whether the call was made.
        path: its path.
        tried_again: files whose fsync was retried after it had failed.
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
    """Make fsync do nothing, as if the call were forgotten.

    Args:
        which: all calls for files, all for directories, or the n-th call, counted from 1.

    Yields:
        The paths for which fsync was called so far, in order.
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
