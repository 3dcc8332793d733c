"""Objectives: evaluate the loss that a training pass minimises, built-in or custom."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from everstep.engine.alignment import tensor_from
from everstep.engine.losses.graph_read import parse_loss_json
from everstep.engine.losses.graph_run import CustomLoss
from everstep.engine.losses.specs import CUSTOM, LOSSES, PROGRAM, LossFunction, LossMetrics
from everstep.wire.messages.passes import Example


@dataclass(frozen=True)
class Term:
    """One datum's part of an objective.

    Attributes:
        value: the loss.
        surrogate: a scalar with the loss's gradient. Built-in losses are their own surrogate.
        metrics: the loss's metrics, if it has some.
    """

    value: float
    surrogate: torch.Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)


Objective = Callable[[Sequence[Example], Sequence[torch.Tensor]], Generator[None, None, list[Term]]]
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


def _built_in(
    loss: LossFunction,
    metrics: LossMetrics | None,
    settings: Mapping[str, float],
    examples: Sequence[Example],
    logps: Sequence[torch.Tensor],
) -> Generator[None, None, list[Term]]:
    yield from ()
    losses, measured = [], []
    for example, logp in zip(examples, logps, strict=True):
        inputs = _tensors(example, logp.device)
        losses.append(loss(logp, inputs, settings))
        measured.append(metrics(logp.detach(), inputs, settings) if metrics is not None else {})
    values = torch.stack(losses).detach().double().tolist()
    return [Term(*each) for each in zip(values, losses, measured, strict=True)]


def _custom(
    loss: CustomLoss, examples: Sequence[Example], logps: Sequence[torch.Tensor]
) -> Generator[None, None, list[Term]]:
    terms = []
    for example, logp in zip(examples, logps, strict=True):
        result = loss.evaluate(logp.detach().float().cpu(), _tensors(example, "cpu"))
        surrogate = (logp * result.gradient.to(logp.device)).sum()
        terms.append(Term(result.loss, surrogate, result.metrics))
        yield
    return terms


def _tensors(example: Example, device: torch.device | str) -> dict[str, Any]:
    return {name: tensor_from(array).to(device) for name, array in example.inputs.items()}
