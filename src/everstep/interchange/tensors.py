"""Tensor files: reads and writes safetensors files one bounded chunk at a time.

A chunk's size does not depend on the tensor's, so neither a shard nor one of its tensors is ever
in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open

from everstep.interchange.errors import UnreadableFile
from everstep.interchange.numbers import Array, from_float32, to_float32
from everstep.safetensors_files import (
    DTYPE_BYTES,
    FLOAT_BYTES,
    TensorSpec,
    encode_header,
    read_header,
)

CHUNK_BYTES = 16 << 20


class TensorFile:
    """A safetensors file.

    Args:
        path: location of the file.

    Attributes:
        path: as given.
        specs: the tensors by name, in the order of their data.

    Raises:
        UnreadableFile: it is not a complete safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="numpy"):
                pass  # its header is valid, and the tensors cover the rest without a gap
            with path.open("rb") as file:
                tensors = read_header(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise UnreadableFile(f"{path.name} is not a whole safetensors file: {error}") from error
        ordered = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))
        self._tensors = dict(ordered)
        self.specs = {name: tensor.spec for name, tensor in ordered}

    def rows(self, name: str, first: int, last: int) -> Array:
        """Read rows of a tensor as float32.

        Raises:
            UnreadableFile: the tensor does not hold floating-point numbers.
        """
        spec = self.specs[name]
        if spec.dtype not in FLOAT_BYTES:
            raise UnreadableFile(
                f"{self.path.name}: {name} has dtype {spec.dtype}, which is no float."
            )
        row = prod(spec.shape[1:]) * FLOAT_BYTES[spec.dtype]
        begin = self._tensors[name].begin
        with self.path.open("rb") as file:
            data = _read_exactly(file, begin + first * row, (last - first) * row)
        return to_float32(data, spec.dtype).reshape(last - first, *spec.shape[1:])

    def whole(self, name: str) -> Array:
        """Read a matrix that is known to be small, as float32. Raises as `rows` does."""
        return self.rows(name, 0, self.specs[name].shape[0])

    def chunks(self, name: str) -> Iterator[bytes]:
        """Read a tensor's bytes unchanged, one bounded chunk after the other."""
        begin, end = self._tensors[name].begin, self._tensors[name].end
        with self.path.open("rb") as file:
            for offset in range(begin, end, CHUNK_BYTES):
                yield _read_exactly(file, offset, min(CHUNK_BYTES, end - offset))

    def converted(self, name: str, dtype: str) -> Iterator[bytes]:
        """Read a tensor's bytes in another dtype, chunk by chunk. Integers stay unchanged.

        Args:
            name: name of the tensor.
            dtype: safetensors' name of the dtype: ``F32``, ``F16`` or ``BF16``.
        """
        stored = self.specs[name].dtype
        for chunk in self.chunks(name):
            if stored == dtype or stored not in FLOAT_BYTES:
                yield chunk
            else:
                yield from_float32(to_float32(chunk, stored), dtype)


def row_ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Split a tensor into row ranges, first and last, that are bounded in float32."""
    step = max(1, CHUNK_BYTES // max(1, 4 * prod(shape[1:])))
    for first in range(0, shape[0], step):
        yield first, min(first + step, shape[0])


def write_tensors(path: Path, tensors: Mapping[str, tuple[TensorSpec, Iterable[bytes]]]) -> int:
    """Write a new file, pulling each tensor's chunks one after the other.

    Args:
        path: location of the file, which must not exist.
        tensors: each tensor's spec and data by name.

    Returns:
        The size of all tensors in bytes.

    Raises:
        UnreadableFile: a tensor has a dtype that cannot be copied.
    """
    specs = {name: spec for name, (spec, _) in tensors.items()}
    for spec in specs.values():
        if spec.dtype not in DTYPE_BYTES:
            raise UnreadableFile(
                f"Tensors of dtype {spec.dtype} can't be copied; use a base without them."
            )
    with path.open("xb") as file:
        file.write(encode_header(specs))
        for _, chunks in tensors.values():
            for chunk in chunks:
                file.write(chunk)
    return sum(spec.nbytes for spec in specs.values())


def _read_exactly(file: BinaryIO, begin: int, size: int) -> bytes:
    file.seek(begin)
    data = file.read(size)
    if len(data) != size:
        raise UnreadableFile(f"{file.name} became shorter while it was read.")
    return data
