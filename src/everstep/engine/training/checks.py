"""Layer checks: choose what computes a model's training passes when it is loaded.

The direct layers are faster, and serve only where hidden states of packed texts and gradients are
those of the modules up to rounding.
"""

from __future__ import annotations

import torch

from everstep.engine.config import AdapterConfig
from everstep.engine.kernels.packing import Packing
from everstep.engine.models.attention import packed, trace_attention
from everstep.engine.models.lora import BoundAdapter
from everstep.engine.models.model import Model
from everstep.engine.training.layers import DirectLayers

_LENGTHS = (7, 7, 3)
"""Lengths of the packed texts: two that attend in one operation, and another."""
_RANK = 4
_SEED = 5
_TOLERANCE = 1e-4
"""Largest norm of a difference in float32, relative to the norm."""
_HALF_ROUNDING = 0.05
"""The same in half precision."""


def choose_layers(model: Model) -> DirectLayers | None:
    """Return direct layers where they compute what the modules compute. None: they don't."""
    if not model.is_llama_like:
        return None
    random = torch.Generator().manual_seed(_SEED)
    packing = Packing(_LENGTHS, 1.0, model.device)
    tokens = torch.randint(model.info.vocab_size, (sum(_LENGTHS),), generator=random)
    tokens = tokens.to(model.device)
    with torch.no_grad(), trace_attention() as trace, packed(packing):
        model.hidden(tokens.unsqueeze(0), position_ids=packing.positions)
    try:
        layers = DirectLayers(model, trace.settings)
    except (AttributeError, TypeError):
        return None
    exact = model.module.dtype in (torch.float32, torch.float64)
    tolerance = _TOLERANCE if exact else _HALF_ROUNDING
    expected, found = (_results(model, each, tokens, packing) for each in (None, layers))
    for one, other in zip(found, expected, strict=True):
        if not (one - other).norm() <= tolerance * other.norm():
            return None
    return layers


def _results(
    model: Model, layers: DirectLayers | None, tokens: torch.Tensor, packing: Packing
) -> list[torch.Tensor]:
    """Return hidden states, and the gradients of an adapter of all projections, flat."""
    random = torch.Generator().manual_seed(_SEED)
    layout = model.layout(AdapterConfig(_RANK))
    leaves = {
        name: torch.randn(shape, generator=random).mul_(0.02).to(model.device).requires_grad_()
        for name, shape in layout.shapes.items()
    }
    bound = BoundAdapter(layout.weights(leaves), layout.config.scale)
    with torch.enable_grad(), model.binding.bind(bound):
        if layers is not None:
            hidden = layers.hidden(tokens, packing, bound)
        else:
            with packed(packing):
                hidden = model.hidden(tokens.unsqueeze(0), position_ids=packing.positions)[0]
        weights = torch.randn(hidden.shape, generator=random).to(model.device)
        loss = (hidden.float() * weights).sum()
        computed = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    used = [each.reshape(-1) for each in computed if each is not None]
    return [hidden.detach().float(), torch.cat(used)]
