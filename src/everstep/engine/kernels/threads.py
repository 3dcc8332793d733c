"""Threads of a pass: one for a small pass, whose operations end before other threads are awake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

MIN_WORK = 1 << 28
"""Tokens times weights of a micro-batch from which all threads compute it. It decides bits."""


@contextmanager
def threads_for(work: int) -> Iterator[None]:
    """Compute a micro-batch with as many threads as it is worth.

    Args:
        work: its tokens times the model's weights.
    """
    threads = torch.get_num_threads()
    if threads == 1 or work >= MIN_WORK:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
