"""Tensors as they travel: an array, its dtype and shape, perhaps sparse CSR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

if TYPE_CHECKING:
    import numpy as np
    import torch

TensorDtype = Literal["float32", "int64"]


class TensorData:
    """A tensor of a request or a result.

    Args:
        data: the values, flat or in shape; for sparse CSR the listed values only.
        dtype: ``float32`` or ``int64``.
        shape: the (dense) shape; a flat list of N is (N,).
        sparse_crow_indices: CSR row pointers, one more than there are rows.
        sparse_col_indices: CSR column indices, one for each value.
    """

    __slots__ = ("_array", "dtype", "shape", "sparse_col_indices", "sparse_crow_indices")

    def __init__(
        self,
        data: Sequence[int] | Sequence[float] | np.ndarray[Any, Any] | None = None,
        dtype: TensorDtype | None = None,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: Sequence[int] | None = None,
        sparse_col_indices: Sequence[int] | None = None,
    ) -> None:
        import numpy as np

        if dtype not in ("float32", "int64"):
            raise ValueError(f"dtype must be 'float32' or 'int64'; got {dtype!r}")
        array = np.asarray([] if data is None else data, dtype=dtype)
        if sparse_crow_indices is None and shape is not None:
            array = array.reshape(tuple(shape))
        self._array = array
        self.dtype: TensorDtype = dtype
        self.shape = list(shape) if shape is not None else None
        self.sparse_crow_indices = _ints(sparse_crow_indices)
        self.sparse_col_indices = _ints(sparse_col_indices)

    @property
    def data(self) -> list[int] | list[float]:
        """The values, flat."""
        flat: list[int] | list[float] = self._array.ravel().tolist()
        return flat

    @classmethod
    def from_numpy(cls, array: np.ndarray[Any, Any]) -> TensorData:
        """Wrap an array; floats become float32, integers int64."""
        dtype: TensorDtype = "float32" if array.dtype.kind == "f" else "int64"
        return cls(array, dtype, list(array.shape))

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        """Wrap a tensor; floats become float32, integers int64."""
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

    def to_numpy(self, pad_value: int = 0) -> np.ndarray[Any, Any]:
        """The dense array; entries that CSR does not list are ``pad_value``."""
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
        """The dense tensor."""
        import torch

        array = self.to_numpy(pad_value)
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    def tolist(self, pad_value: int = 0) -> list[Any]:
        """The dense values as nested lists."""
        values: list[Any] = self.to_numpy(pad_value).tolist()
        return values

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        form: dict[str, Any] = {"data": self.data, "dtype": self.dtype}
        if self.shape is not None:
            form["shape"] = self.shape
        if self.sparse_crow_indices is not None:
            form["sparse_crow_indices"] = self.sparse_crow_indices
            form["sparse_col_indices"] = self.sparse_col_indices
        return form

    def __repr__(self) -> str:
        return f"TensorData(dtype={self.dtype!r}, shape={self.shape}, data={self.data!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorData) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            _tensor,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda tensor: tensor.to_dict()
            ),
            json_schema_input_schema=core_schema.dict_schema(),
        )


def dense_from_csr(
    values: np.ndarray[Any, Any],
    crow_indices: Sequence[int],
    col_indices: Sequence[int],
    shape: Sequence[int],
    pad_value: int = 0,
) -> np.ndarray[Any, Any]:
    """Fill a dense [rows, columns] array from CSR parts.

    Raises:
        ValueError: the parts don't fit one another.
    """
    import numpy as np

    crow = np.asarray(crow_indices, dtype=np.int64)
    col = np.asarray(col_indices, dtype=np.int64)
    fits = (
        len(shape) == 2
        and len(crow) == shape[0] + 1
        and len(crow) > 0
        and crow[0] == 0
        and crow[-1] == len(values) == len(col)
        and bool((np.diff(crow) >= 0).all())
        and (len(col) == 0 or (col.min() >= 0 and col.max() < shape[1]))
    )
    if not fits:
        raise ValueError("sparse CSR indices don't fit the values or the shape")
    dense = np.full(tuple(shape), pad_value, dtype=values.dtype)
    dense[np.repeat(np.arange(shape[0]), np.diff(crow)), col] = values
    return dense


def _ints(values: Sequence[int] | None) -> list[int] | None:
    return None if values is None else [int(value) for value in values]


def _tensor(value: Any) -> TensorData:
    if isinstance(value, TensorData):
        return value
    if isinstance(value, Mapping):
        known = {"data", "dtype", "shape", "sparse_crow_indices", "sparse_col_indices"}
        fields = {key: item for key, item in value.items() if key in known}
        if fields.get("dtype") is None:
            fields["dtype"] = _guessed_dtype(fields.get("data") or [])
        return TensorData(**fields)
    raise ValueError("a tensor is {data, dtype, shape}")


def _guessed_dtype(data: Any) -> TensorDtype:
    import numpy as np

    return "float32" if np.asarray(data).dtype.kind == "f" else "int64"
