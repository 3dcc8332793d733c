"""Integers from text: digits only, bounded, and never an exception."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.integers import MAX_INT64, parse_natural


@given(st.integers(0, MAX_INT64))
def test_natural_number_is_read(number: int) -> None:
    assert parse_natural(str(number)) == parse_natural(f"000{number}") == number


@pytest.mark.parametrize(
    "text", ["", "-1", "+1", "1.0", "1e3", "1_0", " 1", "1\n", "²", "٣", "0x1", str(MAX_INT64 + 1)]
)
def test_other_text_is_no_number(text: str) -> None:
    assert parse_natural(text) is None


def test_five_thousand_digits_are_no_number() -> None:
    assert parse_natural("9" * 5000) is None
    assert parse_natural("0" * 5000 + "7") == 7


@given(st.text(max_size=30), st.integers(0, 1000))
def test_no_text_raises(text: str, maximum: int) -> None:
    number = parse_natural(text, maximum)
    assert number is None or 0 <= number <= maximum
