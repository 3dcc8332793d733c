"""A page of memory in which a worker says what it is doing, readable even after it died.

Two numbers: the call that is being executed, and how many steps were made so far. Writing them
costs a microsecond a step; no message is needed, and none could be sent by a process that was
killed.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from dataclasses import dataclass

_FIELDS = struct.Struct("<QQ")
IDLE = 0
SAMPLING = (1 << 64) - 1


@dataclass(frozen=True)
class Progress:
    """What a worker does.

    Attributes:
        call_id: of the call that is being executed; `IDLE`, or `SAMPLING` for a batch of many.
        steps: made so far.
    """

    call_id: int
    steps: int


class ProgressPage:
    """The page.

    Args:
        descriptor: of the file that both processes map; None makes one.
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
        """Let the page go."""
        self._memory.close()
        os.close(self.descriptor)

    def begin(self, call_id: int) -> None:
        """Say that a step of a call begins."""
        self._steps += 1
        _FIELDS.pack_into(self._memory, 0, call_id, self._steps)

    def rest(self) -> None:
        """Say that nothing is executed."""
        _FIELDS.pack_into(self._memory, 0, IDLE, self._steps)

    def read(self) -> Progress:
        """What was said last."""
        return Progress(*_FIELDS.unpack_from(self._memory, 0))
