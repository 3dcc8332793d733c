"""Differences between two files of tensors, for any pair of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from everstep.cli.checkpoint.tensor_diff import compare, total
from everstep.cli.common.errors import Refused
from tests.profiles import example_count

NUMBERS = st.floats(-100, 100, width=32)
TENSORS = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    arrays.arrays(np.float32, st.sampled_from([(2, 3), (4,), (1,)]), elements=NUMBERS),
    max_size=3,
)


@example_count(50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TENSORS, TENSORS)
def test_every_tensor_is_compared_once_as_numpy_does(tmp_path: Path, a: Any, b: Any) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, tensors in zip(paths, (a, b), strict=True):
        save_file(tensors, path)
    found = {each.name: each for each in compare(*paths)}
    assert found.keys() == a.keys() | b.keys()
    for name, each in found.items():
        if name not in b or name not in a:
            assert each.status == ("only in A" if name in a else "only in B")
        elif a[name].shape != b[name].shape:
            assert each.status == "reshaped"
        else:
            assert (each.status == "same") == (a[name].tobytes() == b[name].tobytes())
            delta = b[name].astype(np.float64) - a[name]
            assert each.norm == pytest.approx(np.linalg.norm(delta))
            assert each.max_abs == pytest.approx(np.abs(delta).max())
            assert each.cosine is None or -1.000001 <= each.cosine <= 1.000001
    assert (total([*found.values()]).status == "same") == all(
        each.status == "same" for each in found.values()
    )
    assert [each.relative for each in compare(*paths)] == sorted(
        (each.relative for each in found.values()), reverse=True
    )


def test_bfloat16_is_compared_as_numbers(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    save_torch({"x": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}, a)
    save_torch({"x": torch.tensor([1.0, 2.5], dtype=torch.bfloat16)}, b)
    (found,) = compare(a, b)
    assert (found.status, found.max_abs) == ("changed", 0.5)
    assert found.norm_a == pytest.approx(5**0.5)


def test_file_without_tensors_is_refused(tmp_path: Path) -> None:
    good, bad = tmp_path / "a", tmp_path / "b"
    save_file({"x": np.zeros(3, np.float32)}, good)
    bad.write_bytes(good.read_bytes()[:-1])
    with pytest.raises(Refused, match="not a whole safetensors file"):
        compare(good, bad)
