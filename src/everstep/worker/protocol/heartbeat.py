"""Heartbeat: a page of shared memory with a worker's progress, readable even after it died.

It holds three numbers: the call that is being executed, how many steps were made so far, and the
call whose files are being written. Writing them costs a microsecond per step and needs no message,
which a killed process could not send.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from dataclasses import dataclass

_FIELDS = struct.Struct("<QQ")
_WRITING = struct.Struct("<Q")
IDLE = 0
SAMPLING = (1 << 64) - 1


@dataclass(frozen=True)
class Progress:
    """A worker's progress.

    Attributes:
        call_id: the call that is being executed. `IDLE`, or `SAMPLING` for a batch of samples.
        steps: steps made so far.
    """

    call_id: int
    steps: int


class HeartbeatPage:
    """The page.

    Args:
        descriptor: the file that both processes map, or None to create one.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            with tempfile.TemporaryFile() as file:
                file.truncate(mmap.PAGESIZE)
                descriptor = os.dup(file.fileno())
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, mmap.PAGESIZE)
        self._steps = 0

    def close(self) -> None:
        """Unmap the page and close its descriptor."""
        self._memory.close()
        os.close(self.descriptor)

    def begin(self, call_id: int) -> None:
        """Record that a step of a call begins."""
        self._steps += 1
        _FIELDS.pack_into(self._memory, 0, call_id, self._steps)

    def rest(self) -> None:
        """Record that nothing is executed."""
        _FIELDS.pack_into(self._memory, 0, IDLE, self._steps)

    def begin_write(self, call_id: int) -> None:
        """Record that the files of a call are being written, beside what is executed."""
        _WRITING.pack_into(self._memory, _FIELDS.size, call_id)

    def end_write(self) -> None:
        """Record that no files are being written."""
        self.begin_write(IDLE)

    @property
    def writing(self) -> int:
        """The call whose files are being written, or `IDLE`."""
        (call_id,) = _WRITING.unpack_from(self._memory, _FIELDS.size)
        return int(call_id)

    def read(self) -> Progress:
        """The progress that was recorded last."""
        return Progress(*_FIELDS.unpack_from(self._memory, 0))
