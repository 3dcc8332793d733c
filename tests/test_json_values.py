"""Values that some JSON reader can't hold are refused wherever a request holds them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.json_values import check_json
from everstep.wire import types
from everstep.wire.base import parse
from everstep.wire.errors import InvalidRequest

POISON = [
    ("a\ud800", "lone surrogate"),
    ("\udfff", "lone surrogate"),
    (math.nan, "nan"),
    (math.inf, "inf"),
    (-math.inf, "inf"),
    (1 << 63, "64 bits"),
    (-(1 << 63) - 1, "64 bits"),
]


@pytest.mark.parametrize(("value", "why"), POISON)
def test_poison_is_found_at_any_depth(value: Any, why: str) -> None:
    for held in (value, [1, value], {"a": [{"b": value}]}):
        with pytest.raises(ValueError, match=why):
            check_json(held, "user_metadata")


def test_poison_is_found_in_a_key() -> None:
    with pytest.raises(ValueError, match="a key of user_metadata holds a lone surrogate"):
        check_json({"\ud800": 1}, "user_metadata")


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(1 << 63), (1 << 63) - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_whatever_json_holds_passes(value: Any) -> None:
    check_json(value, "value")


@pytest.mark.parametrize(
    "metadata",
    ['{"a": NaN}', '{"a": 1e999}', '{"a": [123456789012345678901234567890]}', '{"a": "\\ud800"}'],
)
def test_session_metadata_with_poison_is_refused(metadata: str) -> None:
    with pytest.raises(InvalidRequest):
        parse(types.CreateSessionRequest, b'{"user_metadata": ' + metadata.encode() + b"}")


@pytest.mark.parametrize("name", ["ttl_seconds", "seq_id"])
def test_integer_beyond_64_bits_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=name):
        parse(types.SaveWeightsRequest, {"model_id": "m", name: 10**30})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_parameter_that_is_not_finite_is_refused_where_it_is_built(number: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        types.AdamParams(learning_rate=number)
    with pytest.raises(ValueError, match="finite"):
        types.SamplingParams(temperature=number)
