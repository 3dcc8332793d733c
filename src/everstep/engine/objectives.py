"""What a pass minimises: a loss of the protocol, or one of a user's own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from everstep.engine.custom_loss import CustomLoss
from everstep.engine.loss_graph import read_loss
from everstep.engine.losses import LOSSES, Config
from everstep.engine.validation import CONFIG, CUSTOM, PROGRAM
from everstep.wire.passes import Example


@dataclass(frozen=True)
class Term:
    """What one datum adds to an objective.

    Attributes:
        value: of the loss.
        surrogate: a scalar with the loss's gradient; perhaps the loss itself.
        metrics: of a loss of a user's own.
    """

    value: float
    surrogate: torch.Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)


Objective = Callable[[Sequence[Example], Sequence[torch.Tensor]], Generator[None, None, list[Term]]]
"""Takes datums and their logprobs; yields where others may have a turn."""


def objective(loss_fn: str, config: Mapping[str, float | str]) -> Objective:
    """The objective of a pass; `validation.check_pass` has accepted its name and settings."""
    if loss_fn == CUSTOM:
        return partial(_custom, CustomLoss(read_loss(str(config[PROGRAM]))))
    settings = {**CONFIG[loss_fn], **{key: float(value) for key, value in config.items()}}
    return partial(_built_in, loss_fn, settings)


def combined(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of all datums, in their order: summed, or averaged where they say ``:mean``."""
    sums: dict[str, float] = {}
    for each in metrics:
        for name, value in each.items():
            sums[name] = sums.get(name, 0.0) + value
    return {
        name: value / len(metrics) if name.endswith(":mean") else value
        for name, value in sums.items()
    }


def _built_in(
    loss_fn: str, settings: Config, examples: Sequence[Example], logps: Sequence[torch.Tensor]
) -> Generator[None, None, list[Term]]:
    yield from ()
    losses = [
        LOSSES[loss_fn](logp, _tensors(example, logp.device), settings)
        for example, logp in zip(examples, logps, strict=True)
    ]
    values = torch.stack(losses).detach().double().tolist()
    return [Term(value, loss) for value, loss in zip(values, losses, strict=True)]


def _custom(
    loss: CustomLoss, examples: Sequence[Example], logps: Sequence[torch.Tensor]
) -> Generator[None, None, list[Term]]:
    terms = []
    for example, logp in zip(examples, logps, strict=True):
        found = loss.evaluate(logp.detach().float().cpu(), _tensors(example, "cpu"))
        surrogate = (logp * found.slope.to(logp.device)).sum()
        terms.append(Term(found.loss, surrogate, found.metrics))
        yield
    return terms


def _tensors(example: Example, device: torch.device | str) -> dict[str, Any]:
    return {
        name: torch.from_numpy(array.copy()).to(device) for name, array in example.inputs.items()
    }
