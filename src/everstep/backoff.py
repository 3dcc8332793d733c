"""Backoff: how long to wait before the next attempt."""

from __future__ import annotations

import random
from dataclasses import dataclass

_MAX_DOUBLINGS = 64
_random = random.SystemRandom()  # draws from `random` would change what a program's seed gives


@dataclass(frozen=True)
class Backoff:
    """Exponential backoff with an upper bound and optional jitter.

    Attributes:
        initial: seconds before the first retry. Each further retry doubles it.
        max: upper bound in seconds.
        jitter: fraction of the delay, 0 to 1, that is taken off at random.
    """

    initial: float
    max: float
    jitter: float = 0.0

    def delay(self, attempt: int) -> float:
        """Return the seconds to wait before a retry, counted from 0."""
        seconds = min(self.initial * 2.0 ** min(attempt, _MAX_DOUBLINGS), self.max)
        return seconds * _random.uniform(1.0 - self.jitter, 1.0) if self.jitter else seconds
