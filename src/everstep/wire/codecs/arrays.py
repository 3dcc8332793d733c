"""Array codecs: arrays in protobuf messages as little-endian bytes, to and from numpy.

The functions take messages of ``everstep_pb2`` and raise ValueError where their parts don't fit
together.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from everstep.wire.codecs import everstep_pb2
from everstep.wire.messages.outputs import TopkLogprobs, TopkOutput
from everstep.wire.messages.tensors import TensorData, TensorDtype, dense_from_csr

Array = np.ndarray[Any, Any]
pb: Any = everstep_pb2  # messages are built by name
INT32 = np.dtype("<i4")
INT64 = np.dtype("<i8")
FLOAT32 = np.dtype("<f4")
_MAX_DATUMS = 1 << 20
_MAX_DIMENSIONS = 32
_NUMPY: dict[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: FLOAT32,
    pb.DTYPE_INT64: INT64,
    pb.DTYPE_INT32: INT32,
    pb.DTYPE_BFLOAT16: np.dtype("<u2"),
}
_OF_TENSOR: dict[TensorDtype, tuple[int, np.dtype[Any]]] = {
    "float32": (pb.DTYPE_FLOAT32, FLOAT32),
    "int64": (pb.DTYPE_INT64, INT64),
}


def to_bytes(values: Any, dtype: np.dtype[Any]) -> bytes:
    """Return the bytes of an array or a list in a dtype, in row-major order."""
    return np.ascontiguousarray(values, dtype=dtype).tobytes()


def from_bytes(raw: bytes, dtype: np.dtype[Any]) -> Array:
    """Return a read-only array over the bytes, or raise ValueError for incomplete values."""
    if len(raw) % dtype.itemsize:
        raise ValueError(f"{len(raw)} bytes are not whole {dtype.name} values")
    return np.frombuffer(raw, dtype=dtype)


def widened(raw: bytes, dtype: int) -> tuple[Array, TensorDtype]:
    """Return values as float32 or int64. int32 and bfloat16 are widened exactly."""
    if dtype not in _NUMPY:
        raise ValueError(f"unknown dtype {dtype}")
    values = from_bytes(raw, _NUMPY[dtype])
    if dtype == pb.DTYPE_BFLOAT16:
        return (values.astype(np.uint32) << 16).view(np.float32), "float32"
    if dtype == pb.DTYPE_FLOAT32:
        return values, "float32"
    return values.astype(np.int64, copy=False), "int64"


def record_rows(record: Any) -> list[dict[str, TensorData]]:
    """Return the datums of an ArrayRecord, each with its named tensors."""
    counts = [len(batch.offsets) // INT64.itemsize - 1 for batch in record.fields.values()]
    count = record.num_datums or max(counts, default=0)  # older writers leave num_datums out
    if not 0 <= count <= _MAX_DATUMS:
        raise ValueError(f"a record of {count} datums")
    rows: list[dict[str, TensorData]] = [{} for _ in range(count)]
    for name, batch in sorted(record.fields.items()):
        tensors = _batch_rows(batch)
        if len(tensors) != count:
            raise ValueError(f"{name!r} has {len(tensors)} tensors for {count} datums")
        for row, tensor in zip(rows, tensors, strict=True):
            row[name] = tensor
    return rows


def _batch_rows(batch: Any) -> list[TensorData]:
    """Return the tensors of a BatchedTensor, which share one writable buffer."""
    values, dtype = widened(batch.data, batch.dtype)
    values = values.copy()
    offsets, size = from_bytes(batch.offsets, INT64), _NUMPY[batch.dtype].itemsize
    if bool((offsets % size).any()):
        raise ValueError("offsets are not at whole values")
    trailing = _shape(batch.trailing_shape)
    stride = math.prod(trailing)
    rows = []
    for begin, end in pairwise((offsets // size).tolist()):
        if not 0 <= begin <= end <= len(values):
            raise ValueError(f"values {begin} to {end} are not among the {len(values)}")
        shape = [(end - begin) // stride if stride else 0, *trailing]
        rows.append(TensorData(values[begin:end], dtype, shape))
    return rows


def set_tensor(message: Any, tensor: TensorData) -> None:
    """Write a tensor into a Tensor message. Sparse tensors stay sparse."""
    message.dtype, dtype = _OF_TENSOR[tensor.dtype]
    values = to_bytes(tensor.values, dtype)
    if tensor.sparse_crow_indices is None:
        message.dense = values
        message.shape.extend(tensor.to_numpy().shape)
        return
    message.sparse_csr.values = values
    message.sparse_csr.crow_indices = to_bytes(tensor.sparse_crow_indices, INT64)
    message.sparse_csr.col_indices = to_bytes(tensor.sparse_col_indices or [], INT64)
    message.shape.extend(tensor.shape or [])


def set_array(message: Any, array: Array) -> None:
    """Write a dense array into a Tensor message. Floats become float32, others int64."""
    message.dtype, dtype = _OF_TENSOR["float32" if array.dtype.kind == "f" else "int64"]
    message.dense = to_bytes(array, dtype)
    message.shape.extend(array.shape)


def dense_array(message: Any) -> Array:
    """A Tensor as a dense float32 or int64 array, perhaps read-only."""
    shape = _shape(message.shape)
    if message.WhichOneof("layout") == "sparse_csr":
        csr = message.sparse_csr
        values, _ = widened(csr.values, message.dtype)
        crow, col = from_bytes(csr.crow_indices, INT64), from_bytes(csr.col_indices, INT64)
        return dense_from_csr(values, crow, col, shape)
    values, _ = widened(message.dense, message.dtype)
    return values.reshape(shape) if shape else values


def tensor_data(message: Any) -> TensorData:
    """Return the tensor of a Tensor message. Sparse tensors stay sparse."""
    shape = _shape(message.shape)
    if message.WhichOneof("layout") != "sparse_csr":
        values, dtype = widened(message.dense, message.dtype)
        return TensorData(values.copy(), dtype, shape or [len(values)])
    csr = message.sparse_csr
    values, dtype = widened(csr.values, message.dtype)
    return TensorData(
        values.copy(),
        dtype,
        shape,
        from_bytes(csr.crow_indices, INT64).tolist(),
        from_bytes(csr.col_indices, INT64).tolist(),
    )


def set_topk(message: Any, top: TopkOutput) -> None:
    """Write the likeliest tokens into a TopkLogprobs message."""
    message.token_ids = to_bytes(top.token_ids, INT32)
    message.logprobs = to_bytes(top.logprobs, FLOAT32)
    message.length, message.k = top.token_ids.shape


def topk(message: Any) -> TopkLogprobs | None:
    """Return the likeliest tokens of a TopkLogprobs message, or None if it is empty."""
    shape = _shape([message.length, message.k])
    if 0 in shape:
        return None
    return TopkLogprobs(
        from_bytes(message.token_ids, INT32).reshape(shape).copy(),
        from_bytes(message.logprobs, FLOAT32).reshape(shape).copy(),
    )


def _shape(dims: Any) -> list[int]:
    if len(dims) > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {len(dims)} dimensions")
    shape = list(dims)
    if any(dim < 0 for dim in shape):
        raise ValueError(f"shape has to be 0 or greater in every dimension; got {shape[:8]}")
    return shape
