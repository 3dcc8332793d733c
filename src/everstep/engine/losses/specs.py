"""Loss registry: declares each built-in loss's inputs, settings and target shapes.

Validation, defaults and the table in the guide come from `LOSSES`. To add a loss, write its
function (see `builtin`) and add a `LossSpec`. This module does not import torch: the service
validates with it, and only the worker resolves the functions.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TARGETS = "target_tokens"
"""The input that every loss reads: token ids, int64, as long as the model input."""
CUSTOM = "custom"
"""Name of a loss that a user created. Its `LOSS_ID` is in the settings."""
LOSS_ID = "loss_id"
PROGRAM = "program"
"""Setting under which an accepted pass carries a custom loss's graph, so that replay needs no
lookup."""
CUSTOM_TARGET_DIMS = (1, 2)
STABLE_REINFORCE = "stable_reinforce"
"""A loss of the hosted service whose definition is not public. Everstep's is `topr`'s."""
SAMPLING_LOGPROBS = "sampling_logprobs"
"""Input that an accepted pass of a loss with `LossSpec.recorded` carries: float32 [T], the logprobs
that were recorded at sampling, 0 where the target was not sampled."""
SAMPLED_SEQUENCES = "sampled_sequences"
"""Input that such a pass carries: int64 [T], for each target the number of its sampled sequence in
the datum, counted from 0, and -1 where the target was not sampled."""
SEQUENCE_NUMBERS = "sequence_numbers"
"""Input that the engine adds to `SAMPLED_SEQUENCES`: the numbers that occur in it, from 0 on, so
that a loss knows their count without reading it from a device."""

LossFunction = Callable[
    ["torch.Tensor", Mapping[str, "torch.Tensor"], Mapping[str, float]], "torch.Tensor"
]
"""Takes the targets' logprobs, the datum's inputs and all settings. Returns a scalar."""
LossMetrics = Callable[
    ["torch.Tensor", Mapping[str, "torch.Tensor"], Mapping[str, float]], dict[str, "torch.Tensor"]
]
"""Takes what a `LossFunction` takes. Returns the datum's metrics, ``name:reduction`` → numbers on
the logprobs' device, whose exact sum is the metric."""


@dataclass(frozen=True)
class InputSpec:
    """An array of a datum's ``loss_fn_inputs``: finite, and in the shape of its targets.

    Attributes:
        name: key in ``loss_fn_inputs``.
        minimum: smallest allowed value.
    """

    name: str
    minimum: float = -math.inf


@dataclass(frozen=True)
class SettingSpec:
    """A number in ``loss_fn_config``. It has to be finite.

    Attributes:
        name: key in ``loss_fn_config``.
        default: value where the request gives none.
        at_most: name of another setting that this one must not exceed.
        minimum: smallest allowed value.
    """

    name: str
    default: float
    at_most: str | None = None
    minimum: float = -math.inf


@dataclass(frozen=True)
class LossSpec:
    """A built-in loss.

    Attributes:
        name: value of ``loss_fn``.
        formula: the loss as the guide writes it.
        function: ``module:name`` of a `LossFunction`.
        inputs: arrays that every datum must have besides its targets.
        optional: arrays that a datum may have.
        settings: numbers that ``loss_fn_config`` may hold.
        target_dims: allowed numbers of dimensions of the targets: 1 is [T], 2 is [T, K].
        recorded: whether it reads logprobs that were recorded at sampling. Every datum must have
            provenance, from which the service adds `SAMPLING_LOGPROBS` and `SAMPLED_SEQUENCES`.
        metrics: ``module:name`` of a `LossMetrics`, if it has metrics beside ``loss:sum``.
        silent_where: input that a target gets no gradient from where it is 0. None: there is none.
        definition: whose definition it is. Clients see it in the service's capabilities.
    """

    name: str
    formula: str
    function: str
    inputs: tuple[InputSpec, ...] = ()
    optional: tuple[InputSpec, ...] = ()
    settings: tuple[SettingSpec, ...] = ()
    target_dims: tuple[int, ...] = (1,)
    recorded: bool = False
    metrics: str | None = None
    silent_where: str | None = None
    definition: str = "tinker"

    @property
    def defaults(self) -> dict[str, float]:
        """The settings' default values by name."""
        return {setting.name: setting.default for setting in self.settings}

    def resolve(self) -> LossFunction:
        """Import the function that computes the loss."""
        function: Any = pkgutil.resolve_name(self.function)
        resolved: LossFunction = function
        return resolved

    def resolve_metrics(self) -> LossMetrics | None:
        """Import the function that computes the metrics, if there is one."""
        function: Any = pkgutil.resolve_name(self.metrics) if self.metrics else None
        resolved: LossMetrics | None = function
        return resolved


def _clip_thresholds(low: float, high: float) -> tuple[SettingSpec, SettingSpec]:
    return (
        SettingSpec("clip_low_threshold", low, at_most="clip_high_threshold"),
        SettingSpec("clip_high_threshold", high),
    )


_BUILTIN = "everstep.engine.losses.builtin"
_TOPR = "everstep.engine.losses.topr"
_POLICY = (InputSpec("logprobs"), InputSpec("advantages"))
_SPECS = (
    LossSpec(
        "cross_entropy",
        formula="−Σ w · logp",
        function=f"{_BUILTIN}:cross_entropy",
        optional=(InputSpec("weights"),),
        target_dims=(1, 2),
        silent_where="weights",
    ),
    LossSpec(
        "importance_sampling",
        formula="−Σ r · A",
        function=f"{_BUILTIN}:importance_sampling",
        inputs=_POLICY,
        silent_where="advantages",
    ),
    LossSpec(
        "ppo",
        formula="−Σ min(r · A, clamp(r) · A)",
        function=f"{_BUILTIN}:ppo",
        inputs=_POLICY,
        settings=_clip_thresholds(0.8, 1.2),
        silent_where="advantages",
    ),
    LossSpec(
        "cispo",
        formula="−Σ sg(clamp(r)) · logp · A",
        function=f"{_BUILTIN}:cispo",
        inputs=_POLICY,
        settings=_clip_thresholds(0.0, 4.0),
        silent_where="advantages",
    ),
    LossSpec(
        "dro",
        formula="−Σ [logp · A − ½ β (logp − q)²]",
        function=f"{_BUILTIN}:dro",
        inputs=_POLICY,
        settings=(SettingSpec("beta", 0.05),),
    ),
    LossSpec(
        "gspo",
        formula=(
            "ppo with r_t = sg(s) · exp(logp − sg(logp)), s = exp(mean of logp − q over the mask)"
        ),
        function=f"{_BUILTIN}:gspo",
        inputs=(*_POLICY, InputSpec("sequence_ratio_mask", minimum=0)),
        silent_where="advantages",
        settings=_clip_thresholds(0.8, 1.2),
    ),
    LossSpec(
        STABLE_REINFORCE,
        formula="−Σ sg(c) · logp · A + ½ κ Σ (logp − q)² (Everstep's definition, see below)",
        function=f"{_TOPR}:topr",
        inputs=(InputSpec("advantages"),),
        optional=(InputSpec("logprobs"),),
        settings=(SettingSpec("alpha", 1.0, minimum=0), SettingSpec("kl_coeff", 0.0, minimum=0)),
        recorded=True,
        metrics=f"{_TOPR}:topr_metrics",
        definition=(
            "everstep: tapered off-policy REINFORCE (arXiv 2503.14286), not the hosted service's "
            "definition, which is not public"
        ),
    ),
)
LOSSES: Mapping[str, LossSpec] = {spec.name: spec for spec in _SPECS}
"""The built-in losses by name."""
