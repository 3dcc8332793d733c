"""Pass checks: a text's numbers may not depend on the rest of its pass.

A model that derives something from the whole pass, such as its largest position or its length,
would give a text other numbers beside a longer one, and other ones again with cached keys. The
checks compute a short text in passes that differ in everything else.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from everstep.engine.errors import ModelUnsupported
from everstep.engine.kernels.packing import Packing
from everstep.engine.models.attention import CachedRows, decoding, packed
from everstep.engine.models.float32 import in_float32
from everstep.engine.models.kv_cache import KvCache
from everstep.engine.models.model import Model

_LONGER = 7
"""Times that the text is repeated in a longer pass."""
_TOLERANCE = 1e-3
"""Largest difference of float32 hidden states, relative to the largest."""


@torch.no_grad()
def check_passes(model: Model, tokens: torch.Tensor) -> None:
    """Raise `ModelUnsupported` if a text's numbers depend on the rest of its pass.

    With weights of half precision they are compared in float32.

    Args:
        model: the model.
        tokens: a short text, [1, T].
    """
    text, last = tokens[0], model.info.max_context_length
    if last < 2 * len(text):
        return
    half = model.module.dtype not in (torch.float32, torch.float64)
    with in_float32(model.module) if half else nullcontext():
        found = _differences(model, text, last)
    for how, difference in found.items():
        if not difference <= _TOLERANCE:
            raise ModelUnsupported(
                f"{model.info.architecture} gives a text other numbers {how} (relative difference "
                f"{difference:g}): it derives something from the whole pass that the engine does "
                "not know."
            )


def _differences(model: Model, text: torch.Tensor, last: int) -> dict[str, float]:
    """Return how far a text's hidden states are apart in two passes, by how these passes differ."""
    near = torch.arange(len(text), device=model.device)
    far = near + last - len(text)
    # Of both ends of the context: what is chosen by the largest position must change in between.
    middle = len(text) // 2
    both = torch.cat([near[:middle], far[middle:]])
    alone = _hidden(model, text, near)
    packing = Packing([len(text), len(text)], 1.0, model.device)
    with packed(packing):
        texts = torch.stack([text.flip(0), text]).reshape(1, -1)
        second = model.hidden(texts, position_ids=packing.positions)[0, len(text) :]
    beside = model.hidden(torch.stack([text, text]), position_ids=torch.stack([near, far]))[0]
    longer = text.repeat(1 + _LONGER)[:last]
    positions = torch.arange(len(longer), device=model.device)
    return {
        "beside a text at the end of the context": _apart(beside, alone),
        "packed behind another text": _apart(second, alone),
        "in a longer pass": _apart(_hidden(model, longer, positions)[: len(text)], alone),
        "with keys that were cached at the beginning of the context": _apart(
            _cached(model, text, both, middle), _hidden(model, text, both)
        ),
    }


def _hidden(model: Model, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return model.hidden(tokens.unsqueeze(0), position_ids=positions.unsqueeze(0))[0]


def _cached(
    model: Model, tokens: torch.Tensor, positions: torch.Tensor, middle: int
) -> torch.Tensor:
    """Compute the tokens up to the middle, then the others with their keys and values."""
    cache, states = KvCache(), []
    for part in (slice(0, middle), slice(middle, len(tokens))):
        with decoding([CachedRows(slice(0, 1), cache)]):
            states.append(_hidden(model, tokens[part], positions[part]))
    return torch.cat(states)


def _apart(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest number."""
    return float((first - second).abs().max() / second.abs().max())
