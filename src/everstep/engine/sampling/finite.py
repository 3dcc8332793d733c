"""Finite logits: the check of whatever is drawn from logits or scored by them."""

from __future__ import annotations

from typing import Any

import numpy as np

from everstep.engine.divergence import diverged
from everstep.engine.errors import InputError
from everstep.engine.run_state import Adapter


def check_logits(logits: np.ndarray[Any, Any], adapter: Adapter | None) -> None:
    """Check rows of logits by their largest. Those of -inf are tokens that the model rules out.

    Args:
        logits: of a position, [V], or of several, [R, V].
        adapter: the adapter that they were computed with. None: the base model.

    Raises:
        Diverged: the adapter has diverged.
        InputError: the base model's own logits are not finite.
    """
    if np.isfinite(logits.max(-1)).all():  # NaN if one of a row is
        return
    if adapter is not None:
        raise diverged(adapter.tensors, "the model's logits with it are not finite")
    raise InputError(
        "The base model's logits are not finite for this prompt: serve it in another dtype "
        "(--set dtype=float32), or check its weights."
    )
