"""AdamW over the flat arena: torch's own, fused, with decoupled weight decay and clipping."""

from __future__ import annotations

import torch
from torch.optim.adamw import adamw

from everstep.engine.config import AdamParams
from everstep.engine.state import RunState

_CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


@torch.no_grad()
def optim_step(state: RunState, params: AdamParams) -> dict[str, float]:
    """Make one step and drop the gradients. Without gradients the step is made with zeros.

    Args:
        state: the run.
        params: of this step.

    Returns:
        ``step``, and ``grad_norm`` before clipping.
    """
    buffers = state.arena.writable("params", "grads", "exp_avg", "exp_avg_sq")
    weights, grads, exp_avg, exp_avg_sq = buffers
    norm = torch.linalg.vector_norm(grads)
    if params.grad_clip_norm > 0:
        grads.mul_(torch.clamp(params.grad_clip_norm / (norm + _CLIP_EPS), max=1.0))
    step = torch.tensor(float(state.step), device=weights.device)
    adamw(
        [weights],
        [grads],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        fused=True,
        amsgrad=False,
        beta1=params.beta1,
        beta2=params.beta2,
        lr=params.learning_rate,
        weight_decay=params.weight_decay,
        eps=params.eps,
        maximize=False,
    )
    state.step += 1
    grads.zero_()
    state.has_gradients = False
    return {"optimizer_step": float(state.step), "grad_norm": float(norm)}
