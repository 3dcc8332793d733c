"""Objectives: evaluate the loss that a training pass minimises, built-in or custom."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from everstep.engine.losses.graph_read import parse_loss_json
from everstep.engine.losses.graph_run import CustomLoss
from everstep.engine.losses.specs import (
    CUSTOM,
    LOSSES,
    PROGRAM,
    SAMPLED_SEQUENCES,
    SEQUENCE_NUMBERS,
    LossFunction,
    LossMetrics,
)
from everstep.engine.transfer import upload
from everstep.wire.messages.passes import Example

Metrics = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Term:
    """One datum's part of an objective.

    Attributes:
        value: the loss, a scalar where it was computed.
        surrogate: a scalar with the loss's gradient. Built-in losses are their own surrogate.
        metrics: the loss's metrics, if it has some: numbers whose exact sum is the metric.
    """

    value: torch.Tensor
    surrogate: torch.Tensor
    metrics: Metrics = field(default_factory=dict)


HostLogprobs = Callable[[], Sequence[torch.Tensor]]
"""Copies a micro-batch's logprobs to the host, float32, and checks them."""
Objective = Callable[
    [Sequence[Example], Sequence[torch.Tensor], HostLogprobs], Generator[None, None, list[Term]]
]
"""Takes datums and their logprobs. Yields where another run may take its turn."""


def build_objective(loss_fn: str, config: Mapping[str, float | str]) -> Objective:
    """Build a pass's objective. `validation.check_pass` has accepted its name and settings."""
    if loss_fn == CUSTOM:
        return partial(_custom, CustomLoss(parse_loss_json(str(config[PROGRAM]))))
    spec = LOSSES[loss_fn]
    settings = {**spec.defaults, **{key: float(value) for key, value in config.items()}}
    return partial(_built_in, spec.resolve(), spec.resolve_metrics(), settings)


def combine_metrics(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Reduce the datums' metrics in their order: ``…:mean`` and ``…:max`` so, others to sums."""
    sums: dict[str, float] = {}
    for each in metrics:
        for name, value in each.items():
            if name.endswith(":max"):
                sums[name] = max(sums.get(name, value), value)
            else:
                sums[name] = sums.get(name, 0.0) + value
    return {
        name: value / len(metrics) if name.endswith(":mean") else value
        for name, value in sums.items()
    }


def silent_input(loss_fn: str) -> str | None:
    """Return the input that a target gets no gradient from where it is 0, if a loss has one."""
    return LOSSES[loss_fn].silent_where if loss_fn in LOSSES else None


def _built_in(
    loss: LossFunction,
    metrics: LossMetrics | None,
    settings: Mapping[str, float],
    examples: Sequence[Example],
    logps: Sequence[torch.Tensor],
    host: HostLogprobs,
) -> Generator[None, None, list[Term]]:
    yield from ()
    terms = []
    for example, logp in zip(examples, logps, strict=True):
        inputs = _tensors(example, logp.device)
        value = loss(logp, inputs, settings)
        measured = metrics(logp.detach(), inputs, settings) if metrics is not None else {}
        terms.append(Term(value.detach().double(), value, measured))
    return terms


def _custom(
    loss: CustomLoss,
    examples: Sequence[Example],
    logps: Sequence[torch.Tensor],
    host: HostLogprobs,
) -> Generator[None, None, list[Term]]:
    """Evaluate a program on the host, which needs a micro-batch's logprobs there."""
    terms = []
    for example, logp, known in zip(examples, logps, host(), strict=True):
        result = loss.evaluate(known, _tensors(example, torch.device("cpu")))
        surrogate = (logp * result.gradient.to(logp.device)).sum()
        measured = {name: _scalar(value) for name, value in result.metrics.items()}
        terms.append(Term(_scalar(result.loss), surrogate, measured))
        yield
    return terms


def _scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _tensors(example: Example, device: torch.device) -> dict[str, Any]:
    tensors = {name: upload(array, device) for name, array in example.inputs.items()}
    if SAMPLED_SEQUENCES in example.inputs:
        count = int(example.inputs[SAMPLED_SEQUENCES].max()) + 1
        tensors[SEQUENCE_NUMBERS] = torch.arange(count, device=device)
    return tensors
