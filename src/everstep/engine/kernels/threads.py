"""Threads of a pass: one for a small pass, whose operations end before other threads are awake."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

MIN_WORK = 1 << 28
"""Tokens times weights of a micro-batch from which all threads compute it. It decides bits."""

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


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


def in_one_thread(
    function: Callable[_Parameters, _Result],
    *args: _Parameters.args,
    **kwargs: _Parameters.kwargs,
) -> _Result:
    """Call a function whose operations are computed by this thread alone."""
    threads = torch.get_num_threads()
    if threads == 1:
        return function(*args, **kwargs)
    torch.set_num_threads(1)
    try:
        return function(*args, **kwargs)
    finally:
        torch.set_num_threads(threads)
