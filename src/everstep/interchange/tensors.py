"""Tensors in safetensors files, read and written a piece at a time.

A piece is bounded, whatever the size of the tensor: so neither a shard nor a tensor of it is ever
in memory as a whole. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open

from everstep.interchange.errors import Unreadable
from everstep.interchange.numbers import SIZES, Array, from_float32, to_float32

PIECE_BYTES = 16 << 20
_ALIGNMENT = 8
_OTHER_SIZES = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Spec:
    """A tensor as a header has it: safetensors' name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]


class TensorFile:
    """A safetensors file.

    Args:
        path: where it lies.

    Attributes:
        path: as given.
        specs: the tensors by name, in the file's order.

    Raises:
        Unreadable: it is no whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="numpy"):
                pass  # its header is valid, and the tensors cover the rest without a gap
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
        except (SafetensorError, OSError, ValueError) as error:
            raise Unreadable(f"{path.name} is not a whole safetensors file: {error}") from error
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        self.specs = {name: Spec(e["dtype"], tuple(e["shape"])) for name, e in entries}
        self._places = {name: [8 + size + n for n in e["data_offsets"]] for name, e in entries}

    def rows(self, name: str, first: int, last: int) -> Array:
        """Rows of a tensor as float32.

        Raises:
            Unreadable: it holds no floating-point numbers.
        """
        spec = self.specs[name]
        if spec.dtype not in SIZES:
            raise Unreadable(f"{self.path.name}: {name} has dtype {spec.dtype}, which is no float.")
        row = prod(spec.shape[1:]) * SIZES[spec.dtype]
        begin = self._places[name][0]
        with self.path.open("rb") as file:
            data = _exactly(file, begin + first * row, (last - first) * row)
        return to_float32(data, spec.dtype).reshape(last - first, *spec.shape[1:])

    def whole(self, name: str) -> Array:
        """A matrix that is known to be small, as float32; raises as `rows`."""
        return self.rows(name, 0, self.specs[name].shape[0])

    def pieces(self, name: str) -> Iterator[bytes]:
        """A tensor's bytes as they are, one bounded piece after the other."""
        begin, end = self._places[name]
        with self.path.open("rb") as file:
            for at in range(begin, end, PIECE_BYTES):
                yield _exactly(file, at, min(PIECE_BYTES, end - at))

    def converted(self, name: str, dtype: str) -> Iterator[bytes]:
        """A tensor's bytes in another dtype, piece by piece; what is no float, as it is.

        Args:
            name: of the tensor.
            dtype: safetensors' name of it: ``F32``, ``F16`` or ``BF16``.
        """
        stored = self.specs[name].dtype
        for piece in self.pieces(name):
            if stored == dtype or stored not in SIZES:
                yield piece
            else:
                yield from_float32(to_float32(piece, stored), dtype)


def row_ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First and last row of each piece of a tensor whose rows are worked on in float32."""
    step = max(1, PIECE_BYTES // max(1, 4 * prod(shape[1:])))
    for first in range(0, shape[0], step):
        yield first, min(first + step, shape[0])


def write_tensors(path: Path, tensors: Mapping[str, tuple[Spec, Iterable[bytes]]]) -> int:
    """Write a new file; its pieces are asked for one after the other.

    Args:
        path: where.
        tensors: each one's spec and its bytes.

    Returns:
        The bytes of all tensors.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (spec, _) in tensors.items():
        end = offset + prod(spec.shape) * _size(spec.dtype)
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, pieces in tensors.values():
            for piece in pieces:
                file.write(piece)
    return offset


def _size(dtype: str) -> int:
    sizes = SIZES | _OTHER_SIZES
    if dtype not in sizes:
        raise Unreadable(f"Tensors of dtype {dtype} can't be copied; use a base without them.")
    return sizes[dtype]


def _exactly(file: BinaryIO, begin: int, size: int) -> bytes:
    file.seek(begin)
    data = file.read(size)
    if len(data) != size:
        raise Unreadable(f"{file.name} became shorter while it was read.")
    return data
