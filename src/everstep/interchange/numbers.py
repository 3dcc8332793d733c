"""Number formats: converts weights between the bytes of a file and float32 arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from everstep.safetensors_files import FLOAT_BYTES

Array = np.ndarray[Any, Any]


def to_float32(data: bytes | bytearray | memoryview, dtype: str) -> Array:
    """Convert numbers stored as ``F32``, ``BF16``, ``F16`` or ``F64`` to a flat array.

    Raises:
        ValueError: any other dtype.
    """
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype not in FLOAT_BYTES:
        raise ValueError(f"dtype {dtype} is not one of {', '.join(FLOAT_BYTES)}")
    return np.frombuffer(data, f"<f{FLOAT_BYTES[dtype]}").astype(np.float32)


def from_float32(values: Array, dtype: str) -> bytes:
    """Convert float32 numbers to ``F32``, ``F16`` or ``BF16``, rounded half to even.

    Raises:
        ValueError: any other dtype.
    """
    if dtype == "F32":
        return np.ascontiguousarray(values, "<f4").tobytes()
    if dtype == "F16":
        return values.astype("<f2").tobytes()
    if dtype != "BF16":
        raise ValueError(f"dtype {dtype} is not one of F32, F16, BF16")
    bits = np.ascontiguousarray(values, "<f4").view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded[np.isnan(values)] = 0x7FC0  # rounding would turn some NaNs into infinity
    return rounded.astype("<u2").tobytes()
