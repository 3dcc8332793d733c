"""Backoff: delays double up to their bound, and jitter only shortens them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from everstep.backoff import Backoff


def test_delays_double_up_to_the_maximum() -> None:
    backoff = Backoff(initial=0.5, max=10.0)
    assert [backoff.delay(n) for n in range(7)] == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    assert backoff.delay(10_000) == 10.0


@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
def test_jitter_shortens_a_delay_by_its_fraction_at_most(attempt: int, jitter: float) -> None:
    full = Backoff(initial=0.25, max=30.0).delay(attempt)
    delay = Backoff(initial=0.25, max=30.0, jitter=jitter).delay(attempt)
    assert full * (1.0 - jitter) - 1e-9 <= delay <= full + 1e-9
