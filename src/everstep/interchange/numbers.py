"""Floating-point formats of weights, between the bytes of a file and float32 arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Bytes of a number, of the formats that weights come in."""


def to_float32(data: bytes | bytearray | memoryview, dtype: str) -> Array:
    """A flat array of numbers that were stored as ``F32``, ``BF16``, ``F16`` or ``F64``.

    Raises:
        ValueError: the dtype is another.
    """
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype not in SIZES:
        raise ValueError(f"dtype {dtype} is not one of {', '.join(SIZES)}")
    return np.frombuffer(data, f"<f{SIZES[dtype]}").astype(np.float32)


def from_float32(values: Array, dtype: str) -> bytes:
    """The bytes of float32 numbers as ``F32``, ``F16`` or ``BF16``, rounded half to even.

    Raises:
        ValueError: the dtype is another.
    """
    if dtype == "F32":
        return np.ascontiguousarray(values, "<f4").tobytes()
    if dtype == "F16":
        return values.astype("<f2").tobytes()
    if dtype != "BF16":
        raise ValueError(f"dtype {dtype} is not one of F32, F16, BF16")
    bits = np.ascontiguousarray(values, "<f4").view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded[np.isnan(values)] = 0x7FC0  # rounding would carry some NaNs into infinity
    return rounded.astype("<u2").tobytes()
