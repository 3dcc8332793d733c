"""Divergence: whether weights and moments are finite, and how an error names those that are not.

A step multiplies and adds numbers whose largest magnitudes are known, so a bound of the result is
a few operations on Python's floats. While the bound is far below float32's largest number, nothing
has to be measured, copied or undone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from everstep.engine.config import AdamParams
from everstep.engine.errors import Diverged

LIMIT = 1e37
"""Numbers below it are far from overflowing float32 (3.4e38)."""
_SLACK = 1 + 1e-6
"""Covers the rounding errors of a step in float32."""
_MIN_EPS = 1e-30
_MIN_CORRECTION = 1e-6
"""Below them the optimizer's kernel, in float32, may divide by zero."""


@dataclass(frozen=True)
class Magnitudes:
    """Upper bounds of the absolute values of a run's weights and moments.

    Attributes:
        params: of the weights. Infinite where they are not known, or not finite.
        exp_avg: of the first moments.
        exp_avg_sq: of the second moments.
    """

    params: float
    exp_avg: float
    exp_avg_sq: float

    @classmethod
    def measure(cls, buffers: Mapping[str, torch.Tensor]) -> Magnitudes:
        """Measure an arena's buffers, in one reduction of each."""
        return cls(*(magnitude(buffers[name]) for name in ("params", "exp_avg", "exp_avg_sq")))

    @property
    def finite(self) -> bool:
        """Whether all numbers are known to be finite."""
        return all(map(math.isfinite, (self.params, self.exp_avg, self.exp_avg_sq)))

    def after_step(self, params: AdamParams, step: int, gradient: float) -> Magnitudes:
        """Bound the magnitudes after an AdamW step.

        Args:
            params: parameters of the step.
            step: number of this step, from 1.
            gradient: bound of the gradients' absolute values.

        Returns:
            The bounds. All are infinite where a number of the step may overflow.
        """
        lr, beta1, beta2, eps = params.learning_rate, params.beta1, params.beta2, params.eps
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        if eps < _MIN_EPS or min(correction1, correction2) < _MIN_CORRECTION:
            return UNKNOWN
        exp_avg = beta1 * self.exp_avg + (1 - beta1) * gradient
        exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * gradient * gradient
        rate = lr / correction1
        update = rate * (exp_avg / eps)
        kept = self.params * (1 + lr * params.weight_decay)
        largest = (
            *(gradient * gradient, exp_avg_sq / correction2, exp_avg / eps),
            *(rate * max(1.0, exp_avg), 1 + lr * params.weight_decay, kept + update),
        )
        if not all(number < LIMIT for number in largest):  # False for NaN
            return UNKNOWN
        return Magnitudes(_SLACK * (kept + update), _SLACK * exp_avg, _SLACK * exp_avg_sq)


UNKNOWN = Magnitudes(math.inf, math.inf, math.inf)
"""Nothing is known: the buffers have to be measured."""


def magnitude(tensor: torch.Tensor) -> float:
    """Return the largest absolute value. Infinite if a number is NaN or infinite."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor.detach())  # both are NaN if a number is
    largest = float(torch.maximum(low.abs(), high.abs()))
    return math.inf if math.isnan(largest) else largest


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all numbers are finite, in one reduction without a copy where they are."""
    if math.isfinite(float(tensor.detach().sum())):
        return True
    return bool(tensor.isfinite().all())  # the sum of finite numbers may overflow


def nonfinite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Describe which tensors hold NaN or infinity. None: all are finite."""
    wrong = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if not wrong:
        return None
    return f"NaN or infinity in {len(wrong)} of {len(tensors)} tensors, first in {wrong[0]}"


def diverged(tensors: Mapping[str, torch.Tensor], symptom: str = "") -> Diverged:
    """Build the error of an adapter that has diverged.

    Args:
        tensors: its weights by name.
        symptom: what is wrong with the model's results if the weights themselves are finite.
    """
    found = nonfinite(tensors)
    if found is not None:
        return Diverged(f"This adapter has diverged: its weights hold {found}. {_ADVICE}")
    sizes = {name: magnitude(tensor) for name, tensor in tensors.items()}
    name = max(sizes, key=lambda each: sizes[each])
    return Diverged(
        f"This adapter has diverged: {symptom}. Its largest weight is {sizes[name]:.3g}, in "
        f"{name}. {_ADVICE}"
    )


_ADVICE = "Go back to an earlier checkpoint."
