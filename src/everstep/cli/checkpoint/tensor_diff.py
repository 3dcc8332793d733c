"""Differences between the tensors of two safetensors files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from everstep.cli.common.errors import Refused
from everstep.interchange.errors import UnreadableFile
from everstep.interchange.numbers import Array, to_float32
from everstep.interchange.tensors import TensorFile
from everstep.safetensors_files import FLOAT_BYTES

Status = Literal["same", "changed", "reshaped", "only in A", "only in B"]


@dataclass(frozen=True)
class TensorDifference:
    """The difference between a tensor of A and that of B.

    Attributes:
        name: name of the tensor.
        status: ``same`` if equal in every bit, ``reshaped`` if the numbers can't be compared.
        shape: shape in A, or in B if A lacks the tensor.
        norm_a: Euclidean norm in A.
        norm_b: Euclidean norm in B.
        norm: Euclidean norm of the difference.
        max_abs: largest absolute difference of two numbers.
        cosine: cosine of the angle between the two, or None if one of them is zero.
    """

    name: str
    status: Status
    shape: tuple[int, ...]
    norm_a: float | None = None
    norm_b: float | None = None
    norm: float | None = None
    max_abs: float | None = None
    cosine: float | None = None

    @property
    def relative(self) -> float:
        """Norm of the difference relative to A's, infinite if A's is zero or absent."""
        if self.status == "same":
            return 0.0
        if self.norm is None or not self.norm_a:
            return math.inf
        return self.norm / self.norm_a

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form. Numbers that are not finite become null."""
        content = {**asdict(self), "shape": list(self.shape), "relative": self.relative}
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in content.items()
        }


@dataclass(frozen=True)
class Tensor:
    """A tensor as it is stored in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def numbers(self) -> Array:
        """Return the numbers, flat, in double precision."""
        return to_float32(self.data, self.dtype).astype(np.float64)


def compare(a: Path, b: Path) -> list[TensorDifference]:
    """Compare two files, tensor by tensor. The largest relative difference comes first.

    Raises:
        Refused: one is not a safetensors file, or has a dtype that can't be compared.
    """
    first, second = read(a), read(b)
    names = [*first, *(name for name in second if name not in first)]
    found = [_compare_one(name, first.get(name), second.get(name)) for name in names]
    return sorted(found, key=lambda each: -each.relative)


def total(found: list[TensorDifference]) -> TensorDifference:
    """Combine the differences of all tensors that can be compared, as if they were one."""
    both = [each for each in found if each.norm is not None]

    def length(norms: Iterator[float | None]) -> float:
        return math.sqrt(math.fsum((norm or 0.0) ** 2 for norm in norms))

    norm_a, norm_b = length(e.norm_a for e in both), length(e.norm_b for e in both)
    norm = length(each.norm for each in both)
    dot = (norm_a**2 + norm_b**2 - norm**2) / 2
    return TensorDifference(
        name="all",
        status="same" if all(each.status == "same" for each in found) else "changed",
        shape=(sum(math.prod(each.shape) for each in both),),
        norm_a=norm_a,
        norm_b=norm_b,
        norm=norm,
        max_abs=max((each.max_abs or 0.0 for each in both), default=0.0),
        cosine=max(-1.0, min(1.0, dot / (norm_a * norm_b))) if norm_a and norm_b else None,
    )


def _compare_one(name: str, a: Tensor | None, b: Tensor | None) -> TensorDifference:
    if a is None or b is None:
        present = a or b
        assert present is not None
        norm = float(np.linalg.norm(present.numbers()))
        if b is None:
            return TensorDifference(name, "only in A", present.shape, norm_a=norm)
        return TensorDifference(name, "only in B", present.shape, norm_b=norm)
    x, y = a.numbers(), b.numbers()
    norm_a, norm_b = float(np.linalg.norm(x)), float(np.linalg.norm(y))
    if a.shape != b.shape:
        return TensorDifference(name, "reshaped", a.shape, norm_a, norm_b)
    delta = y - x
    same = (a.dtype, a.data) == (b.dtype, b.data)
    return TensorDifference(
        name=name,
        status="same" if same else "changed",
        shape=a.shape,
        norm_a=norm_a,
        norm_b=norm_b,
        norm=0.0 if same else float(np.linalg.norm(delta)),
        max_abs=0.0 if same or not delta.size else float(np.abs(delta).max()),
        cosine=float(x @ y) / (norm_a * norm_b) if norm_a and norm_b else None,
    )


def read(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file. Raises `Refused` as `compare` does."""
    try:
        file = TensorFile(path)
        tensors = {
            name: Tensor(spec.dtype, spec.shape, b"".join(file.chunks(name)))
            for name, spec in file.specs.items()
        }
    except UnreadableFile as error:
        raise Refused(f"{path}: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT_BYTES:
            raise Refused(f"{path}: {name} has dtype {tensor.dtype}, which can't be compared.")
    return tensors
