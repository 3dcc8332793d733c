"""Tensors of requests and results: dense arrays or sparse CSR."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

from everstep.wire import whole_lists
from everstep.wire.fields import fields_of

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, Any]

TensorDtype = Literal["float32", "int64"]
_SHOWN_VALUES = 8
MAX_DENSE_VALUES = 1 << 26
"""The maximum size of a sparse tensor in dense form. A few bytes can describe any size."""


class TensorData:
    """A tensor of a request or a result.

    Args:
        data: the values, flat or in shape. For sparse CSR only the listed values.
        dtype: ``float32`` or ``int64``.
        shape: the (dense) shape. A flat list of N has the shape (N,).
        sparse_crow_indices: CSR row pointers, one more than there are rows.
        sparse_col_indices: CSR column indices, one for each value.

    Raises:
        ValueError: the parts don't form a tensor. The text names the part.
    """

    __slots__ = ("_array", "dtype", "shape", "sparse_col_indices", "sparse_crow_indices")

    def __init__(
        self,
        data: Sequence[int] | Sequence[float] | Array | None = None,
        dtype: TensorDtype | None = None,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: Sequence[int] | None = None,
        sparse_col_indices: Sequence[int] | None = None,
    ) -> None:
        if dtype not in ("float32", "int64"):
            raise ValueError(f"dtype must be 'float32' or 'int64'; got {dtype!r}")
        if (sparse_crow_indices is None) != (sparse_col_indices is None):
            raise ValueError("give sparse_crow_indices and sparse_col_indices together")
        array = _array([] if data is None else data, dtype, "data")
        dims = None if shape is None else _dims(shape)
        if sparse_crow_indices is None and dims is not None:
            array = _reshaped(array, dims)
        self._array = array
        self.dtype: TensorDtype = dtype
        self.shape = dims
        self.sparse_crow_indices = _ints(sparse_crow_indices, "sparse_crow_indices")
        self.sparse_col_indices = _ints(sparse_col_indices, "sparse_col_indices")

    @property
    def data(self) -> list[int] | list[float]:
        """The values as a flat list."""
        flat: list[int] | list[float] = self._array.ravel().tolist()
        return flat

    @property
    def values(self) -> Array:
        """The listed values of a sparse tensor, or all values of a dense one, as a flat array."""
        return self._array.ravel()

    @classmethod
    def from_numpy(cls, array: Array) -> TensorData:
        """Wrap an array. Floats become float32, integers int64. Others raise ValueError."""
        dtype: TensorDtype = "float32" if array.dtype.kind == "f" else "int64"
        return cls(array, dtype, list(array.shape))

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        """Wrap a tensor. Floats become float32, integers int64."""
        tensor = tensor.detach().cpu()
        return cls.from_numpy((tensor.float() if tensor.is_floating_point() else tensor).numpy())

    @classmethod
    def from_torch_sparse(cls, tensor: torch.Tensor, pad_value: int = 0) -> TensorData:
        """Wrap a 2-D tensor as CSR without its ``pad_value`` entries where that is smaller."""
        import numpy as np

        dense = cls.from_torch(tensor)
        array = dense.to_numpy()
        if array.ndim != 2:
            return dense
        rows, columns = np.nonzero(array != pad_value)
        if len(array) + 1 + 2 * len(rows) >= array.size:
            return dense
        pointers = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(array)))])
        return cls(
            array[rows, columns],
            dense.dtype,
            list(array.shape),
            pointers.tolist(),
            columns.tolist(),
        )

    def to_numpy(self, pad_value: int = 0) -> Array:
        """Return the dense array. Entries that CSR does not list are ``pad_value``.

        Raises:
            ValueError: the CSR parts don't fit together, or the dense array is too large.
        """
        if self.sparse_crow_indices is None:
            return self._array
        return dense_from_csr(
            self._array.ravel(),
            self.sparse_crow_indices,
            self.sparse_col_indices or [],
            self.shape or [],
            pad_value,
        )

    def to_torch(self, pad_value: int = 0) -> torch.Tensor:
        """Return the dense tensor."""
        import torch

        # Copied: where an array lies in a message may decide a product's last bits.
        return torch.tensor(self.to_numpy(pad_value))

    def tolist(self, pad_value: int = 0) -> list[Any]:
        """Return the dense values as nested lists."""
        values: list[Any] = self.to_numpy(pad_value).tolist()
        return values

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        form: dict[str, Any] = {"data": self.data, "dtype": self.dtype}
        if self.shape is not None:
            form["shape"] = self.shape
        if self.sparse_crow_indices is not None:
            form["sparse_crow_indices"] = self.sparse_crow_indices
            form["sparse_col_indices"] = self.sparse_col_indices
        return form

    def __repr__(self) -> str:
        listed = ", ".join(map(repr, self._array.ravel()[:_SHOWN_VALUES].tolist()))
        more = ", …" if self._array.size > _SHOWN_VALUES else ""
        return f"TensorData(dtype={self.dtype!r}, shape={self.shape}, data=[{listed}{more}])"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorData) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            to_tensor,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda tensor: tensor.to_dict()
            ),
            json_schema_input_schema=core_schema.dict_schema(),
        )


def dense_from_csr(
    values: Array,
    crow_indices: Sequence[int] | Array,
    col_indices: Sequence[int] | Array,
    shape: Sequence[int],
    pad_value: int = 0,
) -> Array:
    """Fill a dense [rows, columns] array from CSR parts.

    Raises:
        ValueError: the parts don't fit together, or the array exceeds `MAX_DENSE_VALUES`.
    """
    import numpy as np

    rows, columns = _csr_cells(values, crow_indices, col_indices, shape)
    dense = np.full(tuple(shape), pad_value, dtype=values.dtype)
    dense[rows, columns] = values
    return dense


def _csr_cells(
    values: Array,
    crow_indices: Sequence[int] | Array,
    col_indices: Sequence[int] | Array,
    shape: Sequence[int],
) -> tuple[Array, Array]:
    """Return the row and column of each value. Cells are in order, without repeats."""
    import numpy as np

    crow = np.asarray(crow_indices, dtype=np.int64)
    col = np.asarray(col_indices, dtype=np.int64)
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"a sparse CSR tensor has two dimensions; shape is {list(shape)[:8]}")
    if max(*shape, shape[0] * shape[1]) > MAX_DENSE_VALUES:
        raise ValueError(
            f"a sparse CSR tensor of shape {list(shape)} is too large to be filled out; at most "
            f"{MAX_DENSE_VALUES} values are allowed"
        )
    counts = np.diff(crow)
    fits = (
        len(crow) == shape[0] + 1
        and crow[0] == 0
        and crow[-1] == len(values) == len(col)
        and bool((counts >= 0).all())
        and (len(col) == 0 or (col.min() >= 0 and col.max() < shape[1]))
    )
    if not fits:
        raise ValueError("sparse CSR indices don't fit the values or the shape")
    rows = np.repeat(np.arange(shape[0]), counts)
    if bool((np.diff(rows * shape[1] + col) <= 0).any()):
        raise ValueError("sparse CSR column indices have to ascend within a row, without repeats")
    return rows, col


def _array(values: Any, dtype: str, what: str) -> Array:
    """Return values as an array of the dtype, or raise ValueError if that would change them."""
    import numpy as np

    if (packed := whole_lists.array_of(values, dtype)) is not None:
        return packed
    try:
        array = np.asarray(values)
        if array.dtype.kind == "O":  # None in a list of floats stands for NaN in JSON
            array = np.asarray(values, dtype=dtype)
    except (TypeError, OverflowError, ValueError) as error:
        raise ValueError(f"{what} can't be read as {dtype}: {error}") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{what} has to be numbers to be read as {dtype}; got {array.dtype}")
    with np.errstate(invalid="ignore"):  # checked below
        converted = array.astype(dtype, copy=False)
    if dtype == "int64" and array.dtype.kind in "uf" and not bool((converted == array).all()):
        raise ValueError(f"{what} holds values that are not 64-bit integers")
    return converted


def _reshaped(array: Array, shape: Sequence[int]) -> Array:
    try:
        return array.reshape(tuple(shape))
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"{array.size} values don't make a tensor of shape {list(shape)[:8]}"
        ) from error


def _dims(shape: Sequence[int]) -> list[int]:
    try:
        dims = [operator.index(dim) for dim in shape]
    except TypeError as error:
        raise ValueError(f"shape has to be a list of integers: {error}") from error
    if any(dim < 0 for dim in dims):
        raise ValueError(f"shape has to be 0 or greater in every dimension; got {dims[:8]}")
    return dims


def _ints(values: Sequence[int] | None, what: str) -> list[int] | None:
    if values is None:
        return None
    flat: list[int] = _array(values, "int64", what).ravel().tolist()
    return flat


def to_tensor(value: Any) -> TensorData:
    """Return a tensor of a request, whoever's class it is, and check that its parts fit together.

    Args:
        value: a mapping, an array, or any object with the parts of a tensor.

    Raises:
        ValueError: it has no such parts, or they don't form a tensor.
    """
    if isinstance(value, TensorData):
        return value
    if isinstance(value, Mapping):
        fields = {key: item for key, item in value.items() if key in _FIELDS}
    else:
        fields = _foreign_fields(value)
    if isinstance(fields.get("data"), str | bytes | Mapping | int | float):
        raise ValueError("data has to be a list of numbers")
    if fields.get("dtype") is None:
        fields["dtype"] = _guessed_dtype(fields.get("data") or [])
    tensor = TensorData(**fields)
    if tensor.sparse_crow_indices is not None:
        _csr_cells(
            tensor.values,
            tensor.sparse_crow_indices,
            tensor.sparse_col_indices or [],
            tensor.shape or [],
        )
    return tensor


_FIELDS = frozenset({"data", "dtype", "shape", "sparse_crow_indices", "sparse_col_indices"})


def _foreign_fields(value: Any) -> dict[str, Any]:
    """Return the parts of another package's tensor. Its ``data`` may be a property."""
    package = type(value).__module__.partition(".")[0]
    if package in ("numpy", "torch"):
        made = TensorData.from_numpy(value) if package == "numpy" else TensorData.from_torch(value)
        return {"data": made.to_numpy(), "dtype": made.dtype, "shape": made.shape}
    fields = fields_of(value, _FIELDS)
    if not isinstance(fields, Mapping) or not isinstance(fields.get("dtype"), str):
        raise ValueError(f"a tensor is {{data, dtype, shape}}; got {type(value).__name__}")
    if unknown := sorted(fields.keys() - _FIELDS):
        raise ValueError(f"a tensor has no {', '.join(unknown)}")
    dense = fields.get("sparse_crow_indices") is None and hasattr(value, "to_numpy")
    return {**fields, "data": value.to_numpy() if dense else value.data}


def _guessed_dtype(data: Any) -> TensorDtype:
    import numpy as np

    return "float32" if np.asarray(data).dtype.kind == "f" else "int64"
