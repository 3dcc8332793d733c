"""Hypothesis profiles: how many examples property tests try.

    fast    a quarter of the examples, for `make fast`
    ci      the number that the test names; the default
    soak    twenty times as many, for `make soak`

`EVERSTEP_PROFILE` chooses one. A test names its number with `@example_count(60)`; no test sets a
deadline, because a machine under load would fail it.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

FACTORS = {"fast": 0.25, "ci": 1.0, "soak": 20.0}
PROFILE = os.environ.get("EVERSTEP_PROFILE") or (
    "soak" if os.environ.get("EVERSTEP_SOAK") else "ci"
)

for _name, _factor in FACTORS.items():
    settings.register_profile(_name, deadline=None, max_examples=round(100 * _factor))
settings.load_profile(PROFILE)


def example_count(count: int, **more: Any) -> settings:
    """Return settings with a number of examples, scaled by the profile.

    Args:
        count: the number of examples in the profile `ci`.
        **more: other settings of Hypothesis.
    """
    return settings(max_examples=max(1, round(count * FACTORS[PROFILE])), **more)
