"""Fault-injecting disk: fails at a chosen system call, as an error, a kill or a power cut.

`Disk` patches the functions of `os` that change files. It counts their calls and fails the chosen
one. It also records each fsync. After a power cut only those names are left whose directory was
fsynced after they appeared, and only those bytes whose file was fsynced. A disk may do no worse.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

Death = Literal["kill", "power cut", "error"]
_CHANGES = ("open", "write", "fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir")


class Dead(BaseException):
    """The simulated process has died. The code under test must not catch this."""


class Disk:
    """A directory, ``home``, whose system calls are intercepted while the disk is entered.

    Attributes:
        home: the directory. Each power cut replaces it with a new one.
        steps: number of calls since `fail_after`.
    """

    def __init__(self, base: Path) -> None:
        self._base = Path(tempfile.mkdtemp(dir=base))
        self._serials = itertools.count()
        self._fault: tuple[int, Death] | None = None
        self._dead = False
        self._real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in _CHANGES}
        self._opened: dict[int, Path] = {}
        self._files: dict[int, int] = {}  # inode -> serial number, because inodes are reused
        self._bytes: dict[int, bytes] = {}  # serial number -> synced content
        self._names: dict[Path, dict[str, int | None]] = {}  # directory -> name -> file, None: dir
        self.steps = 0
        self.home = self._new_home()
        self._patches = [
            mock.patch.object(os, name, self._watched(name, real))
            for name, real in self._real.items()
        ]

    def __enter__(self) -> Disk:
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()

    def fail_after(self, calls: int, death: Death) -> None:
        """Fail the first call after this many."""
        self.steps = 0
        self._fault = (calls, death)

    def clear_fault(self) -> None:
        """Let no call fail."""
        self._fault = None

    def restart(self, death: Death) -> None:
        """Continue as the next process, with the content that the death left."""
        self._dead = False
        self._fault = None
        if death == "power cut":
            old = self.home
            self.home = self._new_home()
            self._rebuild(old, self.home)
            shutil.rmtree(old)

    # Calls

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        account = getattr(self, f"_after_{name}", None)

        def call(subject: Any, *arguments: Any, **options: Any) -> Any:
            path = self._opened.get(subject) if isinstance(subject, int) else Path(subject)
            if path is None or not path.is_relative_to(self.home):
                result = real(subject, *arguments, **options)
                if name == "open":
                    self._opened.pop(result, None)
                return result
            if name != "open" or arguments[0] & os.O_CREAT:
                self._step(name, subject, *arguments)
            result = real(subject, *arguments, **options)
            if account is not None:
                account(result, subject, path, *arguments)
            return result

        return call

    def _step(self, name: str, subject: Any, *arguments: Any) -> None:
        if self._dead:
            raise Dead
        self.steps += 1
        if self._fault is None or self.steps <= self._fault[0]:
            return
        death = self._fault[1]
        if name == "write":  # torn
            self._real["write"](subject, memoryview(arguments[0])[: len(arguments[0]) // 2])
        self._fault = None
        if death == "error":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._dead = True
        raise Dead

    def _after_open(self, handle: int, _: Any, path: Path, flags: int, *_mode: int) -> None:
        self._opened[handle] = path
        if flags & os.O_CREAT:
            assert flags & os.O_EXCL, "the vault opened an existing file for writing"
            self._files[os.fstat(handle).st_ino] = next(self._serials)

    def _after_fsync(self, _result: None, handle: int, path: Path) -> None:
        if path.is_dir():
            self._names[path] = {
                entry.name: None if entry.is_dir() else self._files[entry.inode()]
                for entry in os.scandir(path)
            }
        else:
            serial = self._files[os.fstat(handle).st_ino]
            self._bytes[serial] = Path(f"/proc/self/fd/{handle}").read_bytes()

    # The disk after a power cut

    def _new_home(self) -> Path:
        home = self._base / f"disk-{next(self._serials)}"
        home.mkdir()
        self._names = {**getattr(self, "_names", {}), home: {}}
        return home

    def _rebuild(self, old: Path, new: Path) -> None:
        names: dict[str, int | None] = {}
        for name, serial in self._names.pop(old, {}).items():
            if serial is None:
                (new / name).mkdir()
                self._rebuild(old / name, new / name)
                names[name] = None
            else:
                names[name] = copy = next(self._serials)
                self._bytes[copy] = self._bytes.get(serial, b"")
                (new / name).write_bytes(self._bytes[copy])
                self._files[(new / name).stat().st_ino] = copy
        self._names[new] = names
