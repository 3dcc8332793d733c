"""Block file: the process behind a recorded disk. It serves a FUSE file system of two files.

    disk     an image. Every write to it, and every flush, is appended to a log
    marks    reports of a program. Every write to it is appended to the same log

It speaks the kernel's FUSE protocol (linux/fuse.h, version 7) itself: a dozen messages, without a
library to install. `blocktrace` starts it with the FUSE device, the image and the log. It ends when
its standard input ends, or the file system is unmounted.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import struct
import sys
from collections.abc import Callable
from typing import BinaryIO

RECORD = struct.Struct("<cQI")  # kind, offset, length of the data that follow
WRITE, FLUSH, MARK = b"W", b"F", b"M"
_IN = struct.Struct("<IIQQIIII")
_OUT = struct.Struct("<IiQ")
_ATTRIBUTES = struct.Struct("<6Q10I")
_LARGEST = 1 << 20
_ROOT, _DISK, _MARKS = 1, 2, 3
_NAMES = {b"disk": _DISK, b"marks": _MARKS}
_BIG_WRITES, _MAX_PAGES, _UNCACHED = 1 << 5, 1 << 22, 1
_FOREVER = 1 << 30


class BlockFile:
    """Answers the kernel's requests.

    Args:
        device: the open FUSE device.
        image: the disk's content.
        log: receives the writes and flushes.
    """

    def __init__(self, device: int, image: BinaryIO, log: BinaryIO) -> None:
        self._device = device
        self._image = image.fileno()
        self._size = os.fstat(self._image).st_size
        self._log = log
        self._answers: dict[int, Callable[[int, bytes], bytes]] = {
            1: self._lookup,
            3: self._getattr,
            4: self._getattr,  # a file opened to be truncated keeps its size
            14: self._open,
            15: self._read,
            16: self._write,
            17: lambda *_: bytes(80),  # statfs
            18: lambda *_: b"",  # release
            20: self._fsync,
            25: lambda *_: b"",  # flush, which is called at every close, is not fsync
            26: self._init,
            27: lambda *_: bytes(16),  # opendir
            28: lambda *_: b"",  # readdir
            29: lambda *_: b"",  # releasedir
        }

    def serve(self, owner: int) -> None:
        """Answer until the file system is unmounted, or the owner's end of a pipe is closed."""
        while True:
            ready, _, _ = select.select([self._device, owner], [], [])
            if owner in ready:
                return
            try:
                request = os.read(self._device, _LARGEST + 4096)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue
                raise
            self._answer(request)

    def _answer(self, request: bytes) -> None:
        _, operation, unique, node, *_ = _IN.unpack_from(request)
        if operation in (2, 36, 42):  # forget, interrupt: no answer is wanted
            return
        answer = self._answers.get(operation)
        try:
            body, code = (answer(node, request[_IN.size :]), 0) if answer else (b"", errno.ENOSYS)
        except OSError as error:
            body, code = b"", error.errno or errno.EIO
        os.write(self._device, _OUT.pack(_OUT.size + len(body), -code, unique) + body)

    def _init(self, _node: int, body: bytes) -> bytes:
        _, minor, readahead, flags = struct.unpack_from("<IIII", body)
        mine = flags & (_BIG_WRITES | _MAX_PAGES)
        return struct.pack(
            "<IIIIHHIIHHI28x", 7, min(minor, 31), readahead, mine, 8, 6, _LARGEST, 1, 256, 0, 0
        )

    def _attributes(self, node: int) -> bytes:
        mode = stat.S_IFDIR | 0o755 if node == _ROOT else stat.S_IFREG | 0o600
        size = self._size if node == _DISK else 0
        return _ATTRIBUTES.pack(
            node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, os.getuid(), os.getgid(), 0, 4096, 0
        )

    def _lookup(self, _node: int, body: bytes) -> bytes:
        node = _NAMES.get(body.rstrip(b"\0"))
        if node is None:
            raise OSError(errno.ENOENT, "there are two files")
        return struct.pack("<4Q2I", node, 0, _FOREVER, _FOREVER, 0, 0) + self._attributes(node)

    def _getattr(self, node: int, _body: bytes) -> bytes:
        return struct.pack("<QII", _FOREVER, 0, 0) + self._attributes(node)

    def _open(self, node: int, _body: bytes) -> bytes:
        return struct.pack("<QIi", node, _UNCACHED if node == _MARKS else 0, 0)

    def _read(self, node: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        return os.pread(self._image, size, offset) if node == _DISK else b""

    def _write(self, node: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        data = body[40 : 40 + size]
        if node == _DISK:
            os.pwrite(self._image, data, offset)
            self._record(WRITE, offset, data)
        else:
            self._record(MARK, 0, data)
        return struct.pack("<II", size, 0)

    def _fsync(self, node: int, _body: bytes) -> bytes:
        if node == _DISK:
            self._record(FLUSH, 0, b"")
        return b""

    def _record(self, kind: bytes, offset: int, data: bytes) -> None:
        self._log.write(RECORD.pack(kind, offset, len(data)) + data)
        self._log.flush()


def main() -> None:
    """Serve the device, image and log of the command line."""
    device, image, log = sys.argv[1:]
    with open(image, "r+b") as disk, open(log, "ab") as record:  # noqa: PTH123
        BlockFile(int(device), disk, record).serve(sys.stdin.fileno())


if __name__ == "__main__":
    main()
