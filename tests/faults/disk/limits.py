"""Rounds: ``EVERSTEP_SOAK=SECONDS`` runs more of them, ``EVERSTEP_SEED`` repeats one."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator

SOAK = float(os.environ.get("EVERSTEP_SOAK") or 0)
SEED = int(os.environ.get("EVERSTEP_SEED") or 20)


def rounds() -> Iterator[random.Random]:
    """Yield the randomness of one round, or of as many as fit into the soak."""
    until = time.monotonic() + SOAK
    seed = SEED
    while seed == SEED or time.monotonic() < until:
        print(f"EVERSTEP_SEED={seed}")
        yield random.Random(seed)
        seed += 1
