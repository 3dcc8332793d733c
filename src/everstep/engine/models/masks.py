"""Masks: keep transformers from reading positions back from a device.

Where no mask is given, transformers looks into the positions for packed texts, and waits for the
device to answer. It does not look where an attention has no masks of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.masking_utils import AttentionMaskInterface

from everstep.engine.models.attention import NAME
from everstep.engine.transfer import is_accelerator


@contextmanager
def unread_positions(device: torch.device) -> Iterator[None]:
    """Withdraw the engine's masks, which are none, for the duration of a pass on an accelerator."""
    made = AttentionMaskInterface._global_mapping
    if not is_accelerator(device) or NAME not in made:
        yield
        return
    function = made.pop(NAME)
    try:
        yield
    finally:
        made[NAME] = function
