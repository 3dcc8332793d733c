"""Flat arena: a run's parameters in one buffer, its gradients and moments in three more.

An optimizer step is therefore one fused pass, a save is a header and a streamed buffer, and a load
is one copy. A save pins buffers. Where a step overwrites what a save has not yet read, it keeps a
copy in spare memory, a segment at a time: training is delayed by at most one copy in memory, and a
state has never a second copy of its own size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from everstep.engine.spare import SEGMENT, SPARE, SpareMemory, allocate

BUFFERS = ("params", "grads", "exp_avg", "exp_avg_sq")


class Arena:
    """Float32 buffers that share one layout.

    Args:
        shapes: names and shapes of the tensors, in order.
        device: device of the buffers.
        spare: memory for what saves still have to read.
        zero: whether the buffers are zero, or hold anything.

    Attributes:
        shapes: as given.
        size: the numbers in a buffer.
        buffers: the flat buffers by name.
        segments: the parts that buffers are read and kept in.
        spare: as given.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        device: torch.device,
        spare: SpareMemory = SPARE,
        *,
        zero: bool = True,
    ) -> None:
        self.shapes = dict(shapes)
        self.size = sum(int(np.prod(shape)) for shape in shapes.values())
        self.buffers = {name: allocate(self.size, device) for name in BUFFERS}
        if zero:
            for buffer in self.buffers.values():
                buffer.zero_()
        self.segments = [
            slice(begin, min(begin + SEGMENT, self.size)) for begin in range(0, self.size, SEGMENT)
        ]
        self.spare = spare
        self._pins: list[Pinned] = []
        self._changed = threading.Condition()

    def views(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a buffer. They share its memory."""
        return split(self.buffers[name], self.shapes)

    def pin(self, *names: str) -> Pinned:
        """Pin buffers: what they hold now can be read from the result until it is released."""
        with self._changed:
            pinned = Pinned(self, {name: self.buffers[name] for name in names}, self._changed)
            self._pins.append(pinned)
        return pinned

    def unpin(self, pinned: Pinned) -> None:
        """Forget pinned buffers. For `Pinned.release`."""
        if pinned in self._pins:
            self._pins.remove(pinned)

    @property
    def is_pinned(self) -> bool:
        """Whether a save still has to read something."""
        return bool(self._pins)

    def wait_for_spare(self, seconds: float) -> bool:
        """Wait until spare memory can keep all that saves still have to read.

        Returns:
            Whether it can.
        """
        with self._changed:
            return self._changed.wait_for(self._fits, seconds)

    def _fits(self) -> bool:
        wanted = self._unkept()
        return wanted == 0 or wanted <= self.spare.free

    def _unkept(self) -> int:
        """Return how many bytes `writable` would have to keep. The caller holds the lock."""
        return sum(
            4 * (part.stop - part.start)
            for name in self.buffers
            for number, part in enumerate(self.segments)
            if any(pinned.needs(name, number) for pinned in self._pins)
        )

    def writable(self, *names: str) -> list[torch.Tensor]:
        """Return buffers that may be changed in place."""
        for _ in self.writable_parts(*names):
            pass
        return [self.buffers[name] for name in names]

    def writable_parts(self, *names: str) -> Iterator[slice]:
        """Yield parts of buffers as they may be changed in place: one where nothing is pinned.

        Parts that are being read at the moment come last.
        """
        if not self.is_pinned:
            yield slice(0, self.size)
            return
        later = []
        for number, part in enumerate(self.segments):
            if self._keep(names, number, part, wait=False):
                yield part
            else:
                later.append((number, part))
        for number, part in later:
            self._keep(names, number, part, wait=True)
            yield part

    def _keep(self, names: tuple[str, ...], number: int, part: slice, *, wait: bool) -> bool:
        """Keep what saves need of a segment. Returns False where one reads it, unless ``wait``."""
        with self._changed:
            reading = [
                (name, pin) for name in names for pin in self._pins if pin.reads(name, number)
            ]
            if reading and not wait:
                return False
            for name, pin in reading:
                while pin.reads(name, number):
                    self._changed.wait()
            for name in names:
                pins = [pin for pin in self._pins if pin.needs(name, number)]
                if pins:
                    kept = Kept(self.spare, self.buffers[name][part], len(pins))
                    for pin in pins:
                        pin.keep(name, number, kept)
        return True

    def replace(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Put other buffers of the same layout in the place of some. Pins keep the former ones."""
        with self._changed:
            self.buffers.update(buffers)


class Kept:
    """A segment's content in spare memory.

    Args:
        spare: the memory.
        content: what is kept.
        readers: how many saves need it.
    """

    def __init__(self, spare: SpareMemory, content: torch.Tensor, readers: int) -> None:
        self.content = spare.take(content.numel())
        self.content.copy_(content)
        self._spare = spare
        self._readers = readers

    def drop(self) -> None:
        """Record that a save needs it no longer."""
        self._readers -= 1
        if not self._readers:
            self._spare.give(self.content)


class Pinned:
    """What buffers held when they were pinned.

    Args:
        arena: whose they are.
        buffers: the buffers by name.
        changed: the arena's lock, notified when a segment is read or dropped.
    """

    def __init__(
        self, arena: Arena, buffers: Mapping[str, torch.Tensor], changed: threading.Condition
    ) -> None:
        self._arena = arena
        self._buffers = dict(buffers)
        self._changed = changed
        self._kept: dict[tuple[str, int], Kept] = {}
        self._reading: tuple[str, int] | None = None
        self._read: set[tuple[str, int]] = set()

    @property
    def names(self) -> list[str]:
        """The names of the buffers."""
        return list(self._buffers)

    def prepare(self) -> None:
        """Touch the spare memory that a step may need, in the thread that reads."""
        self._arena.spare.prepare(sum(buffer.nbytes for buffer in self._buffers.values()))

    def needs(self, name: str, number: int) -> bool:
        """Whether a segment would be lost if it were overwritten. The caller holds the lock."""
        key = (name, number)
        present = self._arena.buffers[name] is self._buffers.get(name)
        return present and key not in self._kept and key not in self._read

    def reads(self, name: str, number: int) -> bool:
        """Whether a segment is being read where it lies. The caller holds the lock."""
        return self._reading == (name, number) and self.needs(name, number)

    def keep(self, name: str, number: int, kept: Kept) -> None:
        """Read a segment from spare memory from now on. The caller holds the lock."""
        self._kept[name, number] = kept

    def read(self, name: str, *, once: bool) -> Iterator[memoryview]:
        """Yield a buffer's bytes. Each part is valid until the next one is asked for.

        Args:
            name: the buffer.
            once: whether nobody reads it again, so that what was read may be overwritten.
        """
        for number, part in enumerate(self._arena.segments):
            key = (name, number)
            with self._changed:
                assert key not in self._read, "it was read, and may be overwritten by now"
                kept = self._kept.get(key)
                self._reading = key
            content = kept.content if kept is not None else self._buffers[name][part]
            try:
                yield content.detach().cpu().numpy().data.cast("B")
            finally:
                with self._changed:
                    self._reading = None
                    if once:
                        self._read.add(key)
                        self._drop(key)
                    self._changed.notify_all()

    def release(self) -> None:
        """Unpin the buffers. May be called from any thread."""
        with self._changed:
            self._arena.unpin(self)
            for key in list(self._kept):
                self._drop(key)
            self._changed.notify_all()

    def _drop(self, key: tuple[str, int]) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            kept.drop()


def split(buffer: torch.Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """View a flat buffer as tensors."""
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    parts = torch.split(buffer, sizes)
    return {
        name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
