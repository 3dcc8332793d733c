"""Spare memory: blocks that keep what training overwrites while it is still being saved.

Blocks are reused, because the first touch of fresh memory costs many times a copy. Their sum is
bounded for the whole process, and for each CUDA device, so that a save never needs a second copy of
a large state.
"""

from __future__ import annotations

import mmap
import threading
from collections import defaultdict
from functools import cache

import torch

from everstep.engine.alignment import tensor_over
from everstep.engine.kernels import huge_pages

LIMIT = 256 << 20
"""Bytes of spare memory in a process, and on a device."""
SEGMENT = 1 << 21
"""Numbers in a block, and in the segments that a buffer is saved in. A multiple of what the
optimizer's kernel gives to a thread at least, so that its vectors are those of the whole buffer."""
_CPU = torch.device("cpu")


def allocate(count: int, device: torch.device) -> torch.Tensor:
    """Allocate float32 numbers of any content. On a CPU, large ones begin at a page, in huge pages.

    The first touch of a huge page costs a tenth of the touches of the small ones in its place.
    """
    if device.type != "cpu" or 4 * count < huge_pages.MIN_BYTES:
        return torch.empty(count, device=device)
    memory = torch.empty(count + mmap.PAGESIZE // 4, device=device)
    tensor = memory[-memory.data_ptr() % mmap.PAGESIZE // 4 :][:count]
    huge_pages.advise(tensor.data_ptr(), tensor.nbytes)
    return tensor


def zeros(count: int, device: torch.device) -> torch.Tensor:
    """Allocate float32 zeros. On a CPU, large ones take no memory until they are written to.

    Raises:
        MemoryError: the system has not so much memory.
    """
    if device.type != "cpu" or 4 * count < huge_pages.MIN_BYTES:
        return torch.zeros(count, device=device)
    try:
        memory = mmap.mmap(-1, 4 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"can't allocate memory for {count} numbers: {error}") from error
    tensor = tensor_over(memory)
    huge_pages.advise(tensor.data_ptr(), tensor.nbytes)
    return tensor


class SpareMemory:
    """Blocks of memory. Safe to use from several threads.

    On a device, a block may be given back once nothing reads it any more, and is then written on
    the stream that all of training is queued on.

    Args:
        limit: bytes that are kept for reuse, and that `free` counts from.
        device: where they lie.
    """

    def __init__(self, limit: int = LIMIT, device: torch.device = _CPU) -> None:
        self._limit = limit
        self._device = device
        self._lock = threading.Lock()
        self._unused: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._held = 0
        self._used = 0

    @property
    def free(self) -> int:
        """Bytes that can be taken within the limit."""
        with self._lock:
            return self._limit - self._used

    def prepare(self, size: int) -> None:
        """Have blocks ready for so many bytes, as far as the limit allows.

        On a device, torch's allocator has them ready.
        """
        while self._device.type == "cpu":
            with self._lock:
                if self._held + 4 * SEGMENT > min(size, self._limit):
                    return
                self._held += 4 * SEGMENT
            block = allocate(SEGMENT, self._device)
            block.fill_(0)  # touches it
            with self._lock:
                self._unused[SEGMENT].append(block)

    def take(self, count: int) -> torch.Tensor:
        """Return a block of so many numbers, of any content. Beyond the limit it is a new one.

        Raises:
            torch.OutOfMemoryError: the device has no memory left.
        """
        with self._lock:
            if self._unused[count]:
                self._used += 4 * count
                return self._unused[count].pop()
        block = allocate(count, self._device)
        with self._lock:
            self._used += 4 * count
            self._held += 4 * count
        return block

    def give(self, block: torch.Tensor) -> None:
        """Give a block back. Smaller ones than `SEGMENT`, and those beyond the limit, are freed."""
        count = block.numel()
        with self._lock:
            self._used -= 4 * count
            if count == SEGMENT and self._held <= self._limit:
                self._unused[count].append(block)
            else:
                self._held -= 4 * count


SPARE = SpareMemory()
"""The spare memory of this process on the host."""


@cache
def spare_of(device: torch.device) -> SpareMemory:
    """Return the spare memory for buffers of a device: on CUDA its own, else the host's.

    A copy within a device takes a hundredth of one to the host.
    """
    return SpareMemory(device=device) if device.type == "cuda" else SPARE
