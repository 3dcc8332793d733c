"""safetensors headers: written and read as the reference library does, malformed ones rejected."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from everstep.engine.adapter_files import read_safetensors
from everstep.engine.errors import InputError
from everstep.safetensors_files import TensorSpec, decode_header, encode_header, read_header

ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "scalar": np.array(3, dtype=np.int64),
    "empty": np.zeros((0, 4), dtype=np.float16),
    "z": np.array([True, False, True]),
}
DTYPES = {"float32": "F32", "int64": "I64", "float16": "F16", "bool": "BOOL"}


def file_with(header: object) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + bytes(16)


def test_the_reference_library_reads_an_encoded_header() -> None:
    specs = {n: TensorSpec(DTYPES[str(array.dtype)], array.shape) for n, array in ARRAYS.items()}
    header = encode_header(specs)
    assert len(header) % 8 == 0
    found = load(header + b"".join(array.tobytes() for array in ARRAYS.values()))
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert np.array_equal(found[name], array) and found[name].dtype == array.dtype


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_data_begin_at_a_multiple_of_the_alignment(alignment: int) -> None:
    tensors = {"a": np.arange(5, dtype=np.float32)}
    header = encode_header({"a": TensorSpec("F32", (5,))}, alignment)
    assert len(header) % alignment == 0
    found = load(header + tensors["a"].tobytes())
    assert np.array_equal(found["a"], tensors["a"])


@pytest.mark.parametrize("read", [decode_header, lambda data: read_header(BytesIO(data))])
def test_a_header_of_the_reference_library_is_decoded(read: Callable[[bytes], Any]) -> None:
    data = save(ARRAYS, metadata={"format": "np"})
    found = read(data)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        tensor = found[name]
        assert tensor.spec == TensorSpec(DTYPES[str(array.dtype)], array.shape)
        assert data[tensor.begin : tensor.end] == array.tobytes()
        assert tensor.end - tensor.begin == tensor.spec.nbytes == array.nbytes


MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "cut off": file_with({"a": {}})[:12],
    "no JSON": file_with(b"{not json"),
    "not UTF-8": file_with(b'{"\xff": 1}'),
    "a list": file_with([1]),
    "no dtype": file_with({"a": {"shape": [1], "data_offsets": [0, 4]}}),
    "no shape": file_with({"a": {"dtype": "F32", "data_offsets": [0, 4]}}),
    "one offset": file_with({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}),
    "offsets of text": file_with({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}),
    "an entry of text": file_with({"a": "F32"}),
    "deep nesting": file_with(b"[" * 100_000 + b"]" * 100_000),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_header_is_rejected(name: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_header(MALFORMED[name])
    with pytest.raises(InputError, match=r"file\.x is not a safetensors file of float32 tensors"):
        read_safetensors(MALFORMED[name], "file.x")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]},
        {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]},
    ],
    ids=["cut off", "extent", "shape of text", "dtype"],
)
def test_a_tensor_that_does_not_fit_its_file_is_rejected(entry: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"file\.x"):
        read_safetensors(file_with({"a": entry}), "file.x")
