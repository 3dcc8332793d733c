"""Transfers between the host and a model's device, none of which the host waits for one by one.

A copy from or to pageable memory makes the host wait until an accelerator has done all that is
queued. So arrays go up through pinned memory, results stay on the device and come down together,
and the host waits only to bound what is queued. On a CPU nothing is copied that was not before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from everstep.engine.alignment import tensor_from

MAX_QUEUED = 2
"""Micro-batches that are queued beyond the one that is computed. More would not be faster, and
would keep other runs, and the heartbeat of the worker, waiting."""
PIECE = 1 << 21
"""Most numbers of a pinned piece of memory that a buffer is filled through."""
Array = np.ndarray[Any, Any]


def is_accelerator(device: torch.device) -> bool:
    """Whether a device computes what the host queues, while the host goes on."""
    return device.type != "cpu"


def upload(array: Array, device: torch.device) -> torch.Tensor:
    """Copy an array to a device. The host does not wait for the copy."""
    if device.type == "cuda":
        return _pinned_copy(array).to(device, non_blocking=True)
    return tensor_from(array).to(device)


def fill(buffer: torch.Tensor, arrays: Iterable[Array]) -> None:
    """Copy arrays of float32 into a flat buffer, one after the other."""
    if buffer.device.type == "cuda":
        _fill_in_pieces(buffer, arrays)
        return
    on_host = buffer.device.type == "cpu"
    host = buffer if on_host else torch.empty_like(buffer, device="cpu")
    _fill_in_threads(host.numpy(), arrays)
    if not on_host:
        buffer.copy_(host)


def _fill_in_threads(target: Array, arrays: Iterable[Array]) -> None:
    """Fill an array by all threads. Fresh memory takes longer to touch than to copy to."""
    pieces, begin = [], 0
    for array in arrays:
        numbers = array.reshape(-1)
        for first in range(0, numbers.size, PIECE):
            piece = numbers[first : first + PIECE]
            pieces.append((target[begin : begin + piece.size], piece))
            begin += piece.size
    if begin <= PIECE:
        for pair in pieces:
            np.copyto(*pair)
        return
    with ThreadPoolExecutor(torch.get_num_threads(), "fill") as threads:
        for done in [threads.submit(np.copyto, *pair) for pair in pieces]:
            done.result()


def _fill_in_pieces(buffer: torch.Tensor, arrays: Iterable[Array]) -> None:
    """Fill a buffer through pinned memory, a piece while the one before it is copied."""
    queue, begin = QueueBound(buffer.device), 0
    for array in arrays:
        numbers = array.reshape(-1)
        for first in range(0, numbers.size, PIECE):
            piece = _pinned_copy(numbers[first : first + PIECE])
            buffer[begin : begin + len(piece)].copy_(piece, non_blocking=True)
            begin += len(piece)
            queue.mark()


def download(tensors: Sequence[torch.Tensor]) -> list[Array]:
    """Return the arrays of tensors. Those of one dtype come from a device in one copy."""
    arrays: dict[int, Array] = {}
    waiting: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if is_accelerator(tensor.device):
            waiting.setdefault((tensor.device, tensor.dtype), []).append(index)
        else:
            arrays[index] = tensor.detach().numpy()
    for indices in waiting.values():
        parts = [tensors[index].detach() for index in indices]
        flat = to_host(torch.cat([part.reshape(-1) for part in parts]))
        ends = np.cumsum([part.numel() for part in parts])[:-1]
        for index, part, values in zip(indices, parts, np.split(flat, ends), strict=True):
            arrays[index] = values.reshape(part.shape)
    return [arrays[index] for index in range(len(tensors))]


def to_host(tensor: torch.Tensor) -> Array:
    """Copy a tensor from a device to the host, through pinned memory where it is CUDA's."""
    if tensor.device.type != "cuda":
        return np.asarray(tensor.cpu().numpy())
    pinned = _pinned_like(tensor)
    pinned.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return pinned.numpy()


def _pinned_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return pinned memory for a tensor's numbers.

    torch keeps what is freed, and gives it to others once the copies from and to it have ended.
    """
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def _pinned_copy(array: Array) -> torch.Tensor:
    """Copy an array to pinned memory."""
    dtype = tensor_from(np.empty(0, array.dtype)).dtype
    pinned = torch.empty(array.shape, dtype=dtype, pin_memory=True)
    np.copyto(pinned.numpy(), array)
    return pinned


class CopyStream:
    """Copies from a CUDA device to the host, beside what the device computes.

    The device's memory that is read has to stay as it is until a copy has ended: `HostCopy` says
    when, to the host or to the device. So nothing is freed or reused too early, and torch's
    allocator need not know of the second stream.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def mark(self) -> torch.cuda.Event:
        """Mark the end of what this thread has queued on the device so far."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def copy(self, tensor: torch.Tensor, after: torch.cuda.Event) -> HostCopy:
        """Begin to copy a tensor once the work before a mark has been computed. Does not wait."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            pinned = _pinned_like(tensor)
            pinned.copy_(tensor, non_blocking=True)
            return HostCopy(pinned, self.mark(), self._device)


class HostCopy:
    """A copy to the host that is under way.

    Args:
        pinned: where it goes.
        ended: marks its end.
        device: where it comes from.
    """

    def __init__(self, pinned: torch.Tensor, ended: torch.cuda.Event, device: torch.device) -> None:
        self._pinned = pinned
        self._ended = ended
        self._device = device

    def wait(self) -> Array:
        """Wait for the copy, and return it."""
        self._ended.synchronize()
        return self._pinned.numpy()

    def hold_device(self) -> None:
        """Have what this thread queues on the device from now on wait for the copy."""
        torch.cuda.current_stream(self._device).wait_event(self._ended)


def copy_stream(device: torch.device) -> CopyStream | None:
    """Return a stream for copies from a device. None: the host reads its memory, or waits."""
    return CopyStream(device) if device.type == "cuda" else None


class QueueBound:
    """Bounds how much work the host queues on a device.

    Args:
        device: the device. On a CPU nothing is queued.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: deque[torch.cuda.Event] = deque()

    def mark(self) -> None:
        """Mark the end of a piece of work. Waits for the one `MAX_QUEUED` before it."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)
        if len(self._events) > MAX_QUEUED:
            self._events.popleft().synchronize()
