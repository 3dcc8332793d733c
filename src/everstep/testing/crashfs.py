"""A real file system whose power can be cut: ext4 or XFS on a sparse image.

    with CrashFS(directory) as disk:
        (disk.root / "a").write_text("hello")
        disk.cut()
        assert not (disk.root / "a").exists()

A cut is the kernel's own: the shutdown ioctl without a flush of the log. Whatever was not written
to the device by then is gone, dirty pages and the journal's running transaction with it. The
image is then mounted again, as after a restart of the machine.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import struct
import tempfile
from pathlib import Path

from everstep.testing import devices

_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = 2


class CrashFS:
    """A mounted file system, initially empty, whose power can be cut.

    Args:
        directory: holds the image and the mount point. A memory file system is fastest.
        kind: ``ext4`` or ``xfs``.
        size: size of the image in bytes, None for the smallest useful one.
        mkfs: further options of mkfs, such as ``("-N", "64")`` for 64 inodes.

    Attributes:
        root: the mount point.
        cuts: number of power cuts.
    """

    def __init__(
        self,
        directory: Path,
        kind: str = "ext4",
        *,
        size: int | None = None,
        mkfs: tuple[str, ...] = (),
    ) -> None:
        self._kind = kind
        self._size = size or devices.SMALLEST[kind]
        self._mkfs = mkfs
        self._directory = directory
        self.cuts = 0

    def __enter__(self) -> CrashFS:
        self._base = Path(tempfile.mkdtemp(prefix="crashfs-", dir=self._directory))
        try:
            self.root = self._base / "root"
            self.root.mkdir()
            self._image = self._base / "image"
            devices.make(self._kind, self._image, self._size, *self._mkfs)
            devices.mount_image(self._image, self.root, self._kind)
        except BaseException:
            shutil.rmtree(self._base)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        devices.release(self.root)  # one without power may not even say that it is mounted
        shutil.rmtree(self._base)

    def power_off(self) -> None:
        """Cut the power: from now on every call fails that needs the disk."""
        handle = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(handle, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(handle)
        self.cuts += 1

    def power_on(self) -> None:
        """Mount the surviving state. No process may still have a file of it open."""
        devices.unmount(self.root)
        devices.mount_image(self._image, self.root, self._kind)

    def cut(self) -> None:
        """Cut the power and mount the surviving state."""
        self.power_off()
        self.power_on()


@functools.cache
def scratch() -> Path:
    """Return a directory in memory for images if there is one, else one for temporary files."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    return memory if usable else Path(tempfile.gettempdir())
