"""Devices that tests run on: the CPU, and CUDA on a machine with an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.cuda))
"""Parameters of a fixture or a test."""


def skip_without_cuda(item: pytest.Item) -> None:
    """Skip a test that is marked ``cuda`` on a machine without an NVIDIA GPU."""
    if item.get_closest_marker("cuda") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")


@contextmanager
def settings_of(device: str) -> Iterator[None]:
    """Compute on a device as a worker does. Other tests of the process compute on the CPU."""
    from everstep.engine import determinism

    determinism.configure(device)
    try:
        yield
    finally:
        determinism.configure("cpu")
