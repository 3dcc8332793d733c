"""Optimizer: torch's fused AdamW over the flat arena, with gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.optim.adamw import adamw

from everstep.engine.arena import BUFFERS
from everstep.engine.config import AdamParams
from everstep.engine.divergence import Magnitudes, is_finite, nonfinite
from everstep.engine.errors import Diverged
from everstep.engine.run_state import RunState

_CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_
_NAMES = {
    "params": "the weights",
    "exp_avg": "the first moments (exp_avg)",
    "exp_avg_sq": "the second moments (exp_avg_sq)",
}
_UNCHANGED = (
    "The step was not made: weights, moments, step count and pending gradients are as before it."
)


@torch.no_grad()
def optim_step(
    state: RunState, params: AdamParams, *, may_diverge: bool = False
) -> dict[str, float]:
    """Apply one step and clear the gradients. Absent gradients count as zeros.

    Args:
        state: the run's state.
        params: parameters of this step.
        may_diverge: apply the step even if weights or moments become NaN or infinite.

    Returns:
        ``optimizer_step``, and ``grad_norm`` before clipping.

    Raises:
        Diverged: weights or moments would be NaN or infinite. The state is as before.
    """
    norm, size = _norm(state.arena.buffers["grads"])
    after = _bound(state, params, size)
    if may_diverge or after.finite:
        buffers = state.arena.buffers
        for part in state.arena.writable_parts(*BUFFERS):
            pieces = {name: buffer[part] for name, buffer in buffers.items()}
            _apply(pieces, params, state.step, norm)
    else:
        after = _step_copies(state, params, norm, size)
    state.magnitudes = after
    state.step += 1
    state.arena.buffers["grads"].zero_()
    state.has_gradients = False
    state.has_moments = True
    return {"optimizer_step": float(state.step), "grad_norm": size}


def _norm(grads: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Compute the gradients' norm: in float32, or in float64 where its squares overflow.

    Returns:
        The norm on the gradients' device, and as a number.
    """
    norm: torch.Tensor = torch.linalg.vector_norm(grads)
    size = float(norm)
    if not math.isfinite(size):
        norm = torch.linalg.vector_norm(grads, dtype=torch.float64)
        size = float(norm)
    return norm, size


def _bound(state: RunState, params: AdamParams, norm: float) -> Magnitudes:
    """Bound the state after a step. Measures the state where its known bounds do not suffice."""
    gradient = norm
    if params.grad_clip_norm > 0 and math.isfinite(norm):
        gradient = min(norm, 2 * params.grad_clip_norm)
    after = state.magnitudes.after_step(params, state.step + 1, gradient)
    if after.finite:
        return after
    return state.measure().after_step(params, state.step + 1, gradient)


def _step_copies(
    state: RunState, params: AdamParams, norm: torch.Tensor, size: float
) -> Magnitudes:
    """Step copies of the buffers, and keep them if they are finite. Raises as `optim_step`."""
    state.check_weights()
    if not state.magnitudes.finite:
        raise Diverged(
            "This run's optimizer has diverged: its moments hold NaN or infinity, so that no "
            f"step would change a weight as it should. {_UNCHANGED} Load an earlier checkpoint, "
            "or this run's weights without the optimizer (load_state)."
        )
    copies = {name: buffer.clone() for name, buffer in state.arena.buffers.items()}
    _apply(copies, params, state.step, norm)
    after = Magnitudes.measure(copies)
    if not after.finite:
        raise Diverged(_refusal(state, copies, params, size))
    state.arena.replace(copies)
    return after


def _refusal(
    state: RunState, copies: Mapping[str, torch.Tensor], params: AdamParams, norm: float
) -> str:
    """Say what a step would make NaN or infinite, and what to do."""
    if not math.isfinite(norm):
        found = nonfinite(state.arena.views("grads"))
        return f"The pending gradients hold {found}. {_UNCHANGED} Load a checkpoint to drop them."
    wrong = " and ".join(text for name, text in _NAMES.items() if not is_finite(copies[name]))
    return (
        f"This step would make the run diverge: {wrong} would hold NaN or infinity (the gradients' "
        f"norm is {norm:.3g}, learning_rate {params.learning_rate:g}, grad_clip_norm "
        f"{params.grad_clip_norm:g}). {_UNCHANGED} Step again with a smaller learning_rate or with "
        "a grad_clip_norm, or load a checkpoint, which drops the gradients."
    )


def _apply(
    buffers: Mapping[str, torch.Tensor], params: AdamParams, steps: int, norm: torch.Tensor
) -> None:
    """Clip the gradients and make a step, in place.

    Args:
        buffers: the arena's.
        params: parameters of the step.
        steps: number of the steps before it.
        norm: of the gradients.
    """
    grads = buffers["grads"]
    made = torch.full((), float(steps), device=grads.device)  # before anything is changed
    if params.grad_clip_norm > 0:
        grads.mul_(torch.clamp(params.grad_clip_norm / (norm + _CLIP_EPS), max=1.0))
    adamw(
        [buffers["params"]],
        [grads],
        [buffers["exp_avg"]],
        [buffers["exp_avg_sq"]],
        [],
        [made],
        fused=True,
        amsgrad=False,
        beta1=params.beta1,
        beta2=params.beta2,
        lr=params.learning_rate,
        weight_decay=params.weight_decay,
        eps=params.eps,
        maximize=False,
    )
