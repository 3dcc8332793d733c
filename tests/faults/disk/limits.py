"""How much is tried: ``EVERSTEP_SOAK=SECONDS`` makes it more, ``EVERSTEP_SEED`` repeats it."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator

SOAK = float(os.environ.get("EVERSTEP_SOAK") or 0)
SEED = int(os.environ.get("EVERSTEP_SEED") or 20)


def rounds() -> Iterator[random.Random]:
    """One round, or as many as fit into the soak; each with its own chance."""
    until = time.monotonic() + SOAK
    seed = SEED
    while seed == SEED or time.monotonic() < until:
        print(f"EVERSTEP_SEED={seed}")
        yield random.Random(seed)
        seed += 1
