"""Loop devices and mounts, by system calls. A device goes away with its last user."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOOP_CONFIGURE = 0x4C0A
_LOOP_CTL_GET_FREE = 0x4C82
_AUTOCLEAR = 4
_DETACH = 2
_CONTROL = Path("/dev/loop-control")
_libc = ctypes.CDLL(None, use_errno=True)

_MKFS = {
    "ext4": ["-q", "-F", "-b", "4096", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"],
    "xfs": ["-q", "-f", "-K"],
}
_OPTIONS = {"ext4": "commit=300", "xfs": ""}  # nothing becomes durable by waiting
SMALLEST = {"ext4": 16 << 20, "xfs": 300 << 20}


@functools.cache
def why_not(kind: str = "ext4") -> str | None:
    """Return why file systems of a kind can't be mounted here, or None if they can."""
    if os.geteuid() != 0:
        return "mounting a file system needs root"
    if shutil.which(f"mkfs.{kind}") is None:
        return f"there is no mkfs.{kind}"
    if not _CONTROL.exists():
        return "there are no loop devices"
    if kind not in Path("/proc/filesystems").read_text(encoding="ascii").split():
        return f"the kernel knows no {kind}"
    try:
        os.close(os.open(_CONTROL, os.O_RDWR))
    except OSError as error:
        return f"loop devices can't be used: {error}"
    return None


def make(kind: str, image: Path, size: int, *extra: str) -> None:
    """Make a file system on a new sparse image.

    Args:
        kind: ``ext4`` or ``xfs``.
        image: the file.
        size: its size in bytes.
        extra: more options of mkfs.
    """
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run(
        [f"mkfs.{kind}", *_MKFS[kind], *extra, str(image)], check=True, stdout=subprocess.DEVNULL
    )


@contextmanager
def attached(image: Path) -> Iterator[Path]:
    """Attach a loop device to an image, for as long as the context or a mount of it lasts."""
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    backing = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        device, path = _configured(control, backing)
    finally:
        os.close(backing)
        os.close(control)
    try:
        yield path
    finally:
        os.close(device)


def _configured(control: int, backing: int) -> tuple[int, Path]:
    info = struct.pack("<5Q4I64s64s32s2Q", *([0] * 8), _AUTOCLEAR, b"", b"", b"", 0, 0)
    config = bytearray(struct.pack("<II", backing, 0) + info + bytes(64))
    while True:
        path = Path(f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}")
        device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(device, _LOOP_CONFIGURE, config)
        except OSError as error:
            os.close(device)
            if error.errno != errno.EBUSY:  # another process was faster
                raise
        except BaseException:
            os.close(device)
            raise
        else:
            return device, path


def mount(source: Path | str, target: Path, kind: str, options: str | None = None) -> None:
    """Mount a file system.

    Args:
        source: the device.
        target: an empty directory.
        kind: kind of file system.
        options: mount options. By default nothing is written merely because time passes.
    """
    data = _OPTIONS[kind] if options is None else options
    _call("mount", str(source).encode(), bytes(target), kind.encode(), 0, data.encode())


def mount_image(image: Path, target: Path, kind: str) -> None:
    """Mount an image. Its device is detached at the unmount."""
    with attached(image) as device:
        mount(device, target, kind)


def unmount(target: Path) -> None:
    """Unmount a file system that nobody uses."""
    _call("umount2", bytes(target), 0)


def release(target: Path) -> None:
    """Unmount even a file system in use, which then disappears with its last user.

    Args:
        target: the mount point. A directory without a mount is left as it is.
    """
    try:
        _call("umount2", bytes(target), _DETACH)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}", str(arguments))
