"""safetensors headers: encode and decode the part of a file that describes its tensors.

A file is ``<header length: u64><header: JSON><bytes>``, with tensors at stated offsets
(https://github.com/huggingface/safetensors#format). The engine and interchange both use this
module, and it depends on neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

FLOAT_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Bytes per number of the floating-point formats that weights come in."""
_INTEGER_BYTES = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U8": 1, "BOOL": 1}
DTYPE_BYTES = FLOAT_BYTES | _INTEGER_BYTES
"""Bytes per value, by safetensors' names of dtypes."""
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as a header describes it: safetensors' name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data. Raises KeyError for a dtype not in `DTYPE_BYTES`."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, with the offsets of its first byte and of the byte after its last one."""

    spec: TensorSpec
    begin: int
    end: int


def encode_header(tensors: Mapping[str, TensorSpec], alignment: int = 8) -> bytes:
    """Return the beginning of a file whose data are these tensors, in this order, without gaps.

    Args:
        tensors: the tensors by name.
        alignment: the data begin at a multiple of so many bytes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in tensors.items():
        end = offset + spec.nbytes
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(_LENGTH_BYTES + len(encoded)) % alignment)
    return len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded


def decode_header(data: bytes | memoryview) -> dict[str, StoredTensor]:
    """Return a file's tensors by name, in the header's order.

    The tensors' extents are not compared with the file's size.

    Args:
        data: the file, or at least its header with the length before it.

    Raises:
        ValueError: it does not begin with a valid header.
    """
    first = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    try:
        header = json.loads(bytes(data[_LENGTH_BYTES:first]))
        header.pop("__metadata__", None)
        return {name: _stored(entry, first) for name, entry in header.items()}
    except (AttributeError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(f"malformed header ({type(error).__name__}: {error})") from error


def read_header(file: BinaryIO) -> dict[str, StoredTensor]:
    """Read and decode the header of a file that is open at its beginning. Raises ValueError."""
    length = file.read(_LENGTH_BYTES)
    return decode_header(length + file.read(int.from_bytes(length, "little")))


def _stored(entry: Mapping[str, Any], first: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    return StoredTensor(
        TensorSpec(entry["dtype"], tuple(entry["shape"])), first + begin, first + end
    )
