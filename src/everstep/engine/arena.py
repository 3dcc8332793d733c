"""Flat arena: a run's parameters in one buffer, its gradients and moments in three more.

An optimizer step is therefore one fused pass, a save is a header and a streamed buffer, and a load
is one copy. A save pins buffers. Before a step overwrites a segment that a save has not yet read,
it copies the segment to spare memory. So a save delays training by at most one copy in memory, and
a state never needs a second copy of its own size.

Buffers on CUDA are copied to the host on a stream of their own: one segment is copied while the
one before it is written. What a step overwrites is kept on the device. A step then never waits for
the disk, only, on the device, for the segment that is being copied.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from everstep.engine.spare import SEGMENT, SPARE, SpareMemory, allocate, spare_of, zeros
from everstep.engine.transfer import CopyStream, HostCopy, copy_stream

BUFFERS = ("params", "grads", "exp_avg", "exp_avg_sq")


class Arena:
    """Float32 buffers that share one layout.

    Args:
        shapes: names and shapes of the tensors, in order.
        device: device of the buffers.
        spare: memory for what saves still have to read. None: the device's.
        zero: whether to fill the buffers with zeros. If not, their content is undefined.

    Attributes:
        shapes: as given.
        size: the numbers in a buffer.
        buffers: the flat buffers by name.
        segments: the parts that buffers are read and kept in.
        spare: the memory for that.
        copies: a stream for copies to the host. None: saves read the buffers where they lie.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        device: torch.device,
        spare: SpareMemory | None = None,
        *,
        zero: bool = True,
    ) -> None:
        self.shapes = dict(shapes)
        self.size = sum(int(np.prod(shape)) for shape in shapes.values())
        new = zeros if zero else allocate
        self.buffers = {name: new(self.size, device) for name in BUFFERS}
        self.segments = [
            slice(begin, min(begin + SEGMENT, self.size)) for begin in range(0, self.size, SEGMENT)
        ]
        self.spare = spare_of(device) if spare is None else spare
        self.copies = copy_stream(device)
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
        """Whether a save has not yet read all that it pinned."""
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
        """Yield parts of buffers, each once it may be changed in place.

        If nothing is pinned, there is one part. Parts that are being read come last.
        """
        if not self.is_pinned:
            yield slice(0, self.size)
            return
        if self.copies is not None:
            self._keep_on_device(names)
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
        """Keep what saves need of a segment.

        Args:
            names: the buffers.
            number: the segment.
            part: its slice of the buffers.
            wait: whether to wait while a save reads it.

        Returns:
            False if a save reads it and this does not wait. Nothing is kept then.
        """
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
                self._keep_segment(name, number, part)
        return True

    def _keep_on_device(self, names: tuple[str, ...]) -> None:
        """Keep what saves need of buffers, and have the device wait for the copies under way.

        This ends before anything is overwritten, so an error leaves the buffers as they are.
        """
        with self._changed:
            for name in names:
                for number, part in enumerate(self.segments):
                    self._keep_segment(name, number, part)
            for pin in self._pins:
                pin.hold_device()

    def _keep_segment(self, name: str, number: int, part: slice) -> None:
        """Keep what saves need of a segment. The caller holds the lock."""
        pins = [pin for pin in self._pins if pin.needs(name, number)]
        if pins:
            kept = Kept(self.spare, self.buffers[name][part], len(pins), self.copies)
            for pin in pins:
                pin.keep(name, number, kept)

    def clear_gradients(self) -> None:
        """Put zeros in the place of the gradients, which take no memory before the next pass."""
        self.replace({"grads": zeros(self.size, self.buffers["grads"].device)})

    def replace(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Replace buffers by others of the same layout. Pins keep the former ones."""
        with self._changed:
            self.buffers.update(buffers)


class Kept:
    """A segment's content in spare memory.

    Args:
        spare: the memory.
        content: what is kept.
        readers: how many saves need it.
        copies: the arena's.

    Attributes:
        content: the copy.
        ready: mark on the device, which is reached when the copy is there.
    """

    def __init__(
        self,
        spare: SpareMemory,
        content: torch.Tensor,
        readers: int,
        copies: CopyStream | None = None,
    ) -> None:
        self._spare = spare
        try:
            self.content = spare.take(content.numel())
        except torch.OutOfMemoryError:  # the device is full; the step waits for a copy to the host
            self._spare = SPARE
            self.content = SPARE.take(content.numel())
        self.content.copy_(content)
        self.ready = copies.mark() if copies is not None else None
        self._readers = readers

    def drop(self) -> None:
        """Record that one save no longer needs it. The last one frees the memory."""
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
        self._copying: dict[tuple[str, int], HostCopy] = {}
        self._ready = arena.copies.mark() if arena.copies is not None else None

    @property
    def names(self) -> list[str]:
        """The names of the buffers."""
        return list(self._buffers)

    def prepare(self) -> None:
        """Touch the spare memory that a step may need. For the thread that reads."""
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

    def hold_device(self) -> None:
        """Have the device wait for the copies under way. The caller holds the lock."""
        for copy in self._copying.values():
            copy.hold_device()

    def read(self, name: str, *, once: bool) -> Iterator[memoryview]:
        """Yield a buffer's bytes. Each part is valid until the next one is asked for.

        Args:
            name: the buffer.
            once: whether it is read only once, so that what was read may be overwritten.
        """
        copies = self._arena.copies
        return self._read_in_place(name, once) if copies is None else self._copy(name, once, copies)

    def _read_in_place(self, name: str, once: bool) -> Iterator[memoryview]:
        for number, part in enumerate(self._arena.segments):
            key = (name, number)
            with self._changed:
                kept = self._kept_of(key)
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

    def _copy(self, name: str, once: bool, copies: CopyStream) -> Iterator[memoryview]:
        """Yield copies of a device's memory, each while the next one is made."""
        waiting: deque[tuple[str, int]] = deque()
        try:
            for number, part in enumerate(self._arena.segments):
                self._begin_copy((name, number), part, once, copies)
                waiting.append((name, number))
                if number:
                    yield self._end_copy(waiting.popleft(), once)
            while waiting:
                yield self._end_copy(waiting.popleft(), once)
        finally:
            for key in waiting:
                self._end_copy(key, once)

    def _begin_copy(
        self, key: tuple[str, int], part: slice, once: bool, copies: CopyStream
    ) -> None:
        with self._changed:
            kept = self._kept_of(key)
            content, ready = self._buffers[key[0]][part], self._ready
            if kept is not None:
                content, ready = kept.content, kept.ready
            assert ready is not None, "every arena on the device has marks"
            self._copying[key] = copies.copy(content, ready)
            if once:  # a step need not keep it: it waits for the copy
                self._read.add(key)
            self._changed.notify_all()

    def _end_copy(self, key: tuple[str, int], once: bool) -> memoryview:
        """Wait for a copy, and release the memory that was copied."""
        content = self._copying[key].wait()
        with self._changed:
            del self._copying[key]
            if once:
                self._drop(key)
            self._changed.notify_all()
        return content.data.cast("B")

    def _kept_of(self, key: tuple[str, int]) -> Kept | None:
        """Return where a segment is kept, if it is. The caller holds the lock."""
        assert key not in self._read, "it was read, and may be overwritten by now"
        return self._kept.get(key)

    def release(self) -> None:
        """Unpin the buffers. May be called from any thread."""
        with self._changed:
            for copy in self._copying.values():
                copy.wait()
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
