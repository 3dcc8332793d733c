"""Alignment: tensors that enter a computation begin where torch's own allocator begins them.

A product's kernel may treat the numbers before the first aligned address on their own and so add
in another order: MKL's float32 products of one row differ with the alignment to 16 bytes. Views
into files, messages and NumPy arrays begin anywhere. They are copied, and so are weights that are
mapped from a file in which they begin between two multiples.
"""

from __future__ import annotations

from mmap import mmap
from typing import Any

import numpy as np
import torch
from torch import nn

ALIGNMENT = 64
"""Bytes to which torch aligns its allocations on a CPU."""
_Region = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that begins at a multiple of `ALIGNMENT`: itself, or a copy."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def tensor_from(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """Copy an array, wherever it lies, into memory of torch's own."""
    return torch.tensor(array)


def tensor_over(pages: mmap) -> torch.Tensor:
    """Return the float32 numbers of a mapping, which begins at a page and so is aligned."""
    return torch.frombuffer(pages, dtype=torch.float32)


def align_module(module: nn.Module) -> None:
    """Make a module's weights contiguous and aligned. Those that are already stay where they lie.

    Weights that share memory share it afterwards.
    """
    copies: dict[_Region, torch.Tensor] = {}
    for weight in (*module.parameters(), *module.buffers()):
        key = (weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
        if key not in copies:
            copies[key] = aligned(weight.detach().contiguous())
        weight.data = copies[key]
