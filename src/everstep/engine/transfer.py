"""Transfers between the host and a model's device, none of which the host waits for one by one.

A copy from or to pageable memory makes the host wait until an accelerator has done all that is
queued. So arrays go up through pinned memory, results stay on the device and come down together,
and the host waits only to bound what is queued. On a CPU nothing is copied that was not before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from everstep.engine.alignment import tensor_from

MAX_QUEUED = 2
"""Micro-batches that are queued beyond the one that is computed. More would not be faster, and
would keep other runs, and the heartbeat of the worker, waiting."""
Array = np.ndarray[Any, Any]


def is_accelerator(device: torch.device) -> bool:
    """Whether a device computes what the host queues, while the host goes on."""
    return device.type != "cpu"


def upload(array: Array, device: torch.device) -> torch.Tensor:
    """Copy an array to a device. The host does not wait for the copy."""
    tensor = tensor_from(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


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
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return pinned.numpy()


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
