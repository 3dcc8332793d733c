"""The flat arena: all of a run's parameters in one buffer, gradients and moments in three more.

So a step of the optimizer is one fused pass, a save is a header and a streamed buffer, a load is
one copy. A save pins the buffers as they are; whatever changes one that is pinned moves to a
second buffer first, which costs one copy of memory and holds nothing else up.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import torch

BUFFERS = ("params", "grads", "exp_avg", "exp_avg_sq")


class Arena:
    """Float32 buffers of one layout.

    Args:
        shapes: names and shapes of the tensors, in order.
        device: where the buffers lie.

    Attributes:
        shapes: as given.
        buffers: by name, each flat.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        self.shapes = dict(shapes)
        self.size = sum(int(np.prod(shape)) for shape in shapes.values())
        self.buffers = {name: torch.zeros(self.size, device=device) for name in BUFFERS}
        self._pins: dict[int, int] = {}
        self._lock = threading.Lock()

    def views(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a buffer, sharing its memory."""
        return split(self.buffers[name], self.shapes)

    def pin(self, *names: str) -> dict[str, torch.Tensor]:
        """Take buffers as they are now; nothing changes them until they are unpinned."""
        with self._lock:
            taken = {name: self.buffers[name] for name in names}
            for buffer in taken.values():
                self._pins[buffer.data_ptr()] = self._pins.get(buffer.data_ptr(), 0) + 1
        return taken

    def unpin(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Give buffers back; from any thread."""
        with self._lock:
            for buffer in buffers.values():
                self._pins[buffer.data_ptr()] -= 1
                if not self._pins[buffer.data_ptr()]:
                    del self._pins[buffer.data_ptr()]

    def writable(self, *names: str) -> list[torch.Tensor]:
        """Buffers that may be changed in place: those that are pinned are copied first."""
        with self._lock:
            for name in names:
                if self.buffers[name].data_ptr() in self._pins:
                    self.buffers[name] = self.buffers[name].clone()
            return [self.buffers[name] for name in names]


def split(buffer: torch.Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """View a flat buffer as tensors."""
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    parts = torch.split(buffer, sizes)
    return {
        name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
