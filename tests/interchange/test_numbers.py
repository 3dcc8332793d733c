"""Number formats: bfloat16 is rounded as torch does it, for any float32."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.interchange.numbers import from_float32, to_float32

BITS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64)


@given(BITS)
def test_bfloat16_rounding_equals_torchs(bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    wanted = torch.from_numpy(values.copy()).bfloat16().float().numpy()
    assert np.array_equal(to_float32(from_float32(values, "BF16"), "BF16"), wanted, equal_nan=True)


@given(BITS)
def test_bfloat16_values_survive_the_round_trip(bits: list[int]) -> None:
    stored = np.array(bits, np.uint32).astype(np.uint16)
    values = to_float32(stored.tobytes(), "BF16")
    if not np.isnan(values).any():
        assert from_float32(values, "BF16") == stored.tobytes()
    assert np.array_equal(to_float32(from_float32(values, "F32"), "F32"), values, equal_nan=True)
